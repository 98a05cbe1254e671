"""The weights of a layer on ATen and the products with them: as they are given, or prepared.

Prepared, they lie in the order in which oneDNN computes; else every call reorders them, which for the deep layers of a
network, whose weights are many and maps small, takes as long as the products. And there are less of them:
:mod:`spconv_triton.native_folding`. A layer in eval keeps them; else they are prepared in every call, which still takes
less time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .geometry import Geometry
from .native_convolution import (
    add_convolution,
    are_of_onednn,
    are_readable,
    channels_last,
    columns,
    convolve,
    is_matrix_product,
    pointwise,
    representative,
)
from .native_folding import Block, can_fold, can_merge, fold, merge, other_blocks, whole

AVAILABLE = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_convolution_pointwise", "_reorder_convolution_weight")
)


class Weights:
    """The weights of a layer, and its window.

    Args:
        gwc: [M, alpha L / G, k, k].
        pwc: [M, alpha L, 1, 1].
        redundant: [M, L - alpha L, 1, 1]; None where alpha = 1.
        geometry: of the layer.
    """

    def __init__(self, gwc: Tensor, pwc: Tensor, redundant: Tensor | None, geometry: Geometry) -> None:
        self.gwc, self.pwc, self.geometry = gwc, pwc, geometry
        self._redundant = redundant

    @property
    def has_gate(self) -> bool:
        return self._redundant is not None

    @property
    def redundant(self) -> Tensor:
        assert self._redundant is not None
        return self._redundant

    def pointwise_input(self, x: Tensor) -> Tensor:
        """What the point-wise convolutions read, [N, L, H_out, W_out]: ``x`` itself, or in its layout."""
        z = native.pointwise_input(x, self.geometry)
        return z if z is x else channels_last(z)

    def u3(self, x: Tensor, z: Tensor, bias: Tensor | None = None) -> Tensor:
        """U3 + bias as a new tensor, in the dtype of maps.

        Args:
            x: [N, L, H, W].
            z: of :meth:`pointwise_input`.
            bias: [M] or None, dtype of ``x``.
        """
        x3, window = representative(x, self.gwc, self.geometry)
        y = convolve(x3, self.gwc, bias, *window)
        return add_convolution(y, z.narrow(1, 0, self.pwc.shape[1]), self.pwc)

    def u1(self, z: Tensor) -> Tensor:
        """U1 as a new tensor, likewise."""
        return pointwise(z.narrow(1, self.pwc.shape[1], self.redundant.shape[1]), self.redundant)


class Products(NamedTuple):
    """What U3 is made by.

    Attributes:
        form: of the weights: ``"merged"``, ``"folded"`` or ``"prepared"``.
        weight: of the group-wise convolution, in oneDNN's order.
        groups: of that convolution.
        rest: of the point-wise one, each block transposed: [inputs, outputs].
    """

    form: str
    weight: Tensor
    groups: int
    rest: tuple[tuple[Block, Tensor], ...]


class PreparedWeights(Weights):
    """Float32 or bfloat16 weights on a CPU, with what is computed from them, made when first asked for.

    They are for every ``x`` that :func:`are_preparable` with them. Merged and folded weights add up in another order
    than the equations, so what is not finite may come out otherwise: whoever finds such a mean asks :attr:`given`.
    """

    @property
    def given(self) -> Weights:
        """The same, not prepared."""
        return Weights(self.gwc, self.pwc, self._redundant, self.geometry)

    def u3(self, x: Tensor, z: Tensor, bias: Tensor | None = None) -> Tensor:
        _, weight, groups, rest = self.products(x.shape[2], x.shape[3])
        x3, (stride, padding, dilation, _) = representative(x, self.gwc, self.geometry)
        y = torch.ops.mkldnn._convolution_pointwise.default(
            x3, weight, bias, padding, stride, dilation, groups, "none", [], ""
        )
        y = channels_last(y)  # which it is, unless x3 has a single channel
        for block, matrix in rest:
            columns(y, block.output, block.outputs).addmm_(columns(z, block.input, block.inputs), matrix)
        return y

    def u1_into(self, out: Tensor, z: Tensor, bias: Tensor | None) -> Tensor:
        """U1 + bias, written into ``out``, [N, M, H_out, W_out] in channels_last.

        Args:
            out: of the dtype of maps.
            z: of :meth:`pointwise_input`.
            bias: [M] or None, dtype of ``z``.
        """
        read, written = columns(z, self.pwc.shape[1], self.redundant.shape[1]), columns(out, 0, out.shape[1])
        if bias is None:
            torch.mm(read, self._turned_redundant, out=written)
        else:
            torch.addmm(bias, read, self._turned_redundant, out=written)
        return out

    def products(self, height: int, width: int) -> Products:
        """What U3 is made by on maps of ``height`` x ``width``."""
        # Zeros among merged weights make NaN of infinities; the gate tells, and without one nothing does.
        if self.has_gate and can_merge(self.gwc, self.geometry, height, width):
            return self._merged
        return self._folded if can_fold(self.geometry, height, width) else self._prepared

    @functools.cached_property
    def _prepared(self) -> Products:
        return self._pack("prepared", self.gwc, self.geometry.groups, whole(self.pwc))

    @functools.cached_property
    def _folded(self) -> Products:
        groups = self.geometry.groups
        weight = fold(self.gwc, self.pwc, self.geometry)
        return self._pack("folded", weight, groups, other_blocks(self.gwc, groups))

    @functools.cached_property
    def _merged(self) -> Products:
        return self._pack("merged", merge(self.gwc, self.pwc, self.geometry), 1, ())

    @functools.cached_property
    def _turned_redundant(self) -> Tensor:
        return self.redundant.flatten(1).t()

    def _pack(self, form: str, weight: Tensor, groups: int, rest: tuple[Block, ...]) -> Products:
        _, stride, padding, dilation, _ = self.geometry  # the order is the same for wider rows
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, None)
        return Products(form, packed, groups, tuple((block, block.of(self.pwc).t()) for block in rest))


def prepare(x: Tensor, gwc: Tensor, pwc: Tensor, redundant: Tensor | None, geometry: Geometry) -> Weights:
    """The weights for a forward on ``x``, prepared where that is possible; they keep none of the autograd graph."""
    kind = PreparedWeights if are_preparable(x, gwc, geometry) else Weights
    return kind(gwc.detach(), pwc.detach(), None if redundant is None else redundant.detach(), geometry)


def are_preparable(x: Tensor, weight_gwc: Tensor, geometry: Geometry) -> bool:
    """Whether oneDNN computes with prepared weights what it would with given ones, for this ``x``."""
    if not (AVAILABLE and are_of_onednn(x) and x.numel() > 0 and is_matrix_product(x)):
        return False
    _, stride, padding, dilation, groups = geometry
    x3 = x.narrow(1, 0, weight_gwc.shape[1] * groups)
    return torch._C._get_mkldnn_enabled() and are_readable(x3, weight_gwc, stride, padding, dilation)
