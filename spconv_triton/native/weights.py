"""The weights of a layer on ATen and the products with them: as they are given, or prepared.

Prepared, there are less of them (:mod:`spconv_triton.native.folding`), and for each shape of inputs they lie in the
order in which oneDNN computes; else every call reorders them, which for the deep layers of a network, whose weights are
many and maps small, takes as long as the products. A layer in eval keeps them. For a single call they are at most
folded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Geometry
from . import branches
from .convolution import are_of_onednn, are_readable, channels_last, convolve, representative, representative_view
from .folding import Block, can_fold, fold, folding_pays, is_worth_merging, merge, merging_pays, other_blocks, whole
from .gate import gate_comes_first
from .parts import samples_of_shape
from .products import (
    can_be_matrix_product,
    columns,
    is_large,
    is_matrix_product,
    maps,
    plus_pointwise,
    pointwise,
    takes_convolutions,
)

AVAILABLE = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name)
    for name in (
        "_convolution_pointwise",
        "_linear_pointwise",
        "_reorder_convolution_weight",
        "_reorder_linear_weight",
    )
)

PLANS = 8
"""How many shapes are remembered: each has weights of its own."""

GATED_BYTES = 4 << 20
"""Of a map, from which the gate comes first, if there are GATED_PIXELS too: reading the map once more takes longer."""

GATED_PIXELS = 8
"""Output pixels per input channel, from which a map less is worth that half of Wp is not folded."""

EXCHANGED_CHANNELS = 32
"""Of a group, from which oneDNN's convolution of two groups takes less time than two products of ATen's."""


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

    def gate_first(self, x: Tensor) -> bool:
        """Whether the gate comes before the branches, which then are no maps."""
        return self.has_gate and gate_comes_first(x, self.geometry)

    def path(self, x: Tensor) -> str:
        """What :data:`spconv_triton.dispatch.PATHS` calls the way of an inference on ``x``."""
        return "gate first" if self.gate_first(x) else "given weights"

    @property
    def given(self) -> Weights:
        """The same, neither joined nor prepared."""
        return Weights(self.gwc, self.pwc, self._redundant, self.geometry)

    def pointwise_input(self, x: Tensor) -> Tensor:
        """What the point-wise convolutions read, [N, L, H_out, W_out]: ``x`` itself, or in its layout."""
        z = branches.pointwise_input(x, self.geometry)
        return z if z is x else channels_last(z)

    def u3(self, x: Tensor, z: Tensor, bias: Tensor | None = None) -> Tensor:
        """U3 + bias as a new tensor, in the dtype of maps.

        Args:
            x: [N, L, H, W].
            z: of :meth:`pointwise_input`.
            bias: [M] or None, dtype of ``x``.
        """
        if z is x and not is_matrix_product(x, self.pwc.numel()):  # both convolutions would copy a slice
            x3 = channels_last(x.narrow(1, 0, self.pwc.shape[1]))
            return plus_pointwise(convolve(x3, self.gwc, bias, *self.geometry[1:]), x3, self.pwc)
        return plus_pointwise(self.convolve(x, bias), z, self.pwc)

    def convolve(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """GWC(x3) + bias, likewise."""
        x3, window = representative(x, self.gwc, self.geometry)
        return convolve(x3, self.gwc, bias, *window)

    def u1(self, z: Tensor) -> Tensor:
        """U1 as a new tensor, likewise."""
        return pointwise(z, self.redundant, self.pwc.shape[1])


class MergedWeights(Weights):
    """The same for a single call on few channels, with those of x3 merged. They add up in another order, too, so that
    whoever finds a mean that is not finite asks :attr:`given`."""

    def gate_first(self, x: Tensor) -> bool:  # noqa: ARG002
        return False

    def path(self, x: Tensor) -> str:  # noqa: ARG002
        return "merged weights"

    def u3(self, x: Tensor, z: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: ARG002, Wp reads x too
        merged = merge(self.gwc, self.pwc, self.geometry)
        x3, window = representative(x, merged, self.geometry._replace(groups=1))
        return channels_last(F.conv2d(x3, merged, bias, *window))

    def u1(self, z: Tensor, bias: Tensor | None = None) -> Tensor:
        u1 = super().u1(z)
        return u1 if bias is None else u1.add_(bias[:, None, None])


class Form(NamedTuple):
    """The form that weights are prepared in: what U3 is made by.

    Attributes:
        name: ``"merged"``, ``"folded"`` or ``"prepared"``.
        weight: of the group-wise convolution, in oneDNN's order if it is packed.
        groups: of that convolution.
        rest: of the point-wise one, each block transposed: [inputs, outputs].
    """

    name: str
    weight: Tensor
    groups: int
    rest: tuple[tuple[Block, Tensor], ...]


class Plan(NamedTuple):
    """What is the same in every call on inputs of one shape, found once.

    Attributes:
        form: of the weights.
        exchanged: ``form.rest`` as one convolution of two groups, on x3 with its halves exchanged, in oneDNN's order;
            None where that does not take less time.
        view: shape and strides of x3 in x; None for a slice of channels, which oneDNN copies.
        window: stride, padding and dilation of that view's convolution.
        pixels: H_out W_out, as a tensor, since ATen makes one of a number in every call.
        is_z: whether the point-wise convolutions read x itself.
        gate_first: whether the gate comes first.
        samples: how many go through the branches together.
    """

    form: Form
    exchanged: Tensor | None
    view: tuple[Any, Any] | None
    window: tuple[Any, Any, Any]
    pixels: Tensor
    is_z: bool
    gate_first: bool
    samples: int


class PreparedWeights(Weights):
    """Float32 or bfloat16 weights on a CPU, with what is computed from them, made when first asked for.

    They are for every ``x`` that :func:`are_preparable` with them. Merged and folded weights add up in another order
    than the equations, so what is not finite may come out otherwise: whoever finds such a mean asks :attr:`given`.

    Args:
        gwc, pwc, redundant, geometry: as of :class:`Weights`.
        packs: whether to bring them into oneDNN's order, which is for more than one call.
    """

    def __init__(
        self, gwc: Tensor, pwc: Tensor, redundant: Tensor | None, geometry: Geometry, packs: bool = True
    ) -> None:
        super().__init__(gwc, pwc, redundant, geometry)
        self._packs = packs
        self._plans: dict[tuple[int, ...], Plan] = {}

    def plan(self, shape: tuple[int, ...]) -> Plan:
        """For an x of this shape."""
        plan = self._plans.get(shape)
        if plan is None:
            for oldest in list(self._plans)[: max(0, len(self._plans) - PLANS + 1)]:
                self._plans.pop(oldest, None)
            plan = self._plans[shape] = self._make_plan(shape)
        return plan

    def gate_first(self, x: Tensor) -> bool:
        return self.plan(x.shape).gate_first

    def path(self, x: Tensor) -> str:
        plan = self.plan(x.shape)
        return "gate first" if plan.gate_first else f"{plan.form.name} weights"

    def u3(self, x: Tensor, z: Tensor, bias: Tensor | None = None) -> Tensor:
        y, plan = self.convolve(x, bias), self.plan(x.shape)
        if plan.exchanged is not None:
            first, second = z.narrow(1, 0, self.pwc.shape[1]).chunk(2, 1)
            read = channels_last(torch.cat((second, first), 1))
            torch.ops.mkldnn._convolution_pointwise_.binary(
                y, read, plan.exchanged, None, (0, 0), (1, 1), (1, 1), 2, "add", 1.0, None, [], None
            )
            return y
        for block, matrix in plan.form.rest:
            columns(y, block.output, block.outputs).addmm_(columns(z, block.input, block.inputs), matrix)
        return y

    def convolve(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """GWC'(x3) + bias: GWC(x3) where the gate comes first."""
        (_, weight, groups, _), _, view, (stride, padding, dilation), *_ = self.plan(x.shape)
        x3 = x.narrow(1, 0, self.pwc.shape[1]) if view is None else x.as_strided(*view)
        y = torch.ops.mkldnn._convolution_pointwise.default(
            x3, weight, bias, padding, stride, dilation, groups, "none", [], ""
        )
        return channels_last(y)  # which it is, unless x3 has a single channel

    def u1(self, z: Tensor, bias: Tensor | None = None) -> Tensor:
        """U1 + bias as a new tensor, likewise."""
        read = columns(z, self.pwc.shape[1], self.redundant.shape[1])
        if is_large(read.shape[0], self.redundant):
            y = torch.ops.mkldnn._linear_pointwise.default(read, self._large_redundant, bias, "none", [], "")
        elif bias is None:
            y = torch.mm(read, self._turned_redundant)
        else:
            y = torch.addmm(bias, read, self._turned_redundant)
        return maps(y, (z.shape[0], y.shape[1], z.shape[2], z.shape[3]))

    def _make_plan(self, shape: tuple[int, ...]) -> Plan:
        batch, _, height, width = shape
        size = self.geometry.output_size(height, width)
        is_z = self.geometry.is_centred and self.geometry.stride == (1, 1)
        pixels = torch.tensor(size[0] * size[1], dtype=torch.float32, device="cpu")  # whatever the defaults are now
        rows = batch * size[0] * size[1]
        bytes_of_map = rows * self.gwc.shape[0] * self.gwc.itemsize
        gate_first = self.has_gate and bytes_of_map > GATED_BYTES and rows > GATED_PIXELS * batch * shape[1]
        view, window = representative_view(shape, self.gwc.shape, self.geometry)
        by_convolutions = takes_convolutions(self.pwc.dtype, rows * self.pwc.numel())
        if by_convolutions and not is_worth_merging(self.gwc, self.geometry, height, width):
            gate_first = False  # products with weights of each sample are ATen's
        of_x3 = (batch, self.pwc.shape[1], height, width) if view is None else view[0]
        form = self._form(height, width, gate_first)
        if self._packs:
            form = form._replace(weight=_packed(form.weight, of_x3, *window[:3], form.groups))
        exchanged = None
        if by_convolutions and self._packs and len(form.rest) == 2 and form.rest[0][0].inputs >= EXCHANGED_CHANNELS:
            blocks = torch.cat([block.of(self.pwc) for block, _ in form.rest])[:, :, None, None]
            exchanged = _packed(blocks, (batch, self.pwc.shape[1], *size), (1, 1), (0, 0), (1, 1), 2)
        samples = samples_of_shape(shape, self.gwc.itemsize, self.gwc.shape[0], size)
        return Plan(form, exchanged, view, window[:3], pixels, is_z, gate_first, samples)

    def _form(self, height: int, width: int, gate_first: bool) -> Form:
        groups = self.geometry.groups
        # Zeros among merged weights make NaN of infinities; the gate tells, and without one nothing does.
        if not gate_first and self.has_gate and is_worth_merging(self.gwc, self.geometry, height, width):
            return Form("merged", merge(self.gwc, self.pwc, self.geometry), 1, ())
        if not gate_first and can_fold(self.geometry, height, width):
            blocks, name, weight = other_blocks(self.gwc, groups), "folded", fold(self.gwc, self.pwc, self.geometry)
        else:
            blocks, name, weight = whole(self.pwc), "prepared", self.gwc
        return Form(name, weight, groups, tuple((block, block.of(self.pwc).t()) for block in blocks))

    @functools.cached_property
    def _turned_redundant(self) -> Tensor:
        return self.redundant.flatten(1).t()

    @functools.cached_property
    def _large_redundant(self) -> Tensor:
        matrix = self.redundant.flatten(1).contiguous()
        return torch.ops.mkldnn._reorder_linear_weight(matrix, None) if self._packs else matrix


def _packed(
    weight: Tensor,
    x: Sequence[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """A weight in the order in which oneDNN convolves an input of this shape.

    The order depends on it. On processors with AVX2 alone a weight in another took up to 20 ms a call to reorder.
    """
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, list(x))


def prepare(x: Tensor, gwc: Tensor, pwc: Tensor, redundant: Tensor | None, geometry: Geometry) -> Weights:
    """The weights for many forwards on inputs like ``x``, prepared where that is possible; no graph is kept."""
    given = _detached(gwc, pwc, redundant, geometry)
    return PreparedWeights(*given, packs=True) if are_preparable(x, gwc, geometry) else Weights(*given)


def for_one_call(x: Tensor, gwc: Tensor, pwc: Tensor, redundant: Tensor | None, geometry: Geometry) -> Weights:
    """The weights for one forward on ``x``: merged or folded where that takes less time than it saves, never packed."""
    given = _detached(gwc, pwc, redundant, geometry)
    if redundant is None or not are_preparable(x, gwc, geometry):
        return Weights(*given)
    if merging_pays(x, gwc, geometry):
        return MergedWeights(*given)
    if folding_pays(x, gwc, geometry) and not gate_comes_first(x, geometry):
        return PreparedWeights(*given, packs=False)
    return Weights(*given)


def _detached(
    gwc: Tensor, pwc: Tensor, redundant: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor | None, Geometry]:
    return gwc.detach(), pwc.detach(), None if redundant is None else redundant.detach(), geometry


def are_preparable(x: Tensor, weight_gwc: Tensor, geometry: Geometry) -> bool:
    """Whether oneDNN computes with prepared weights what it would with given ones, for this ``x``."""
    if not (AVAILABLE and are_of_onednn(x) and x.numel() > 0 and can_be_matrix_product(x)):
        return False
    _, stride, padding, dilation, groups = geometry
    x3 = x.narrow(1, 0, weight_gwc.shape[1] * groups)
    return torch._C._get_mkldnn_enabled() and are_readable(x3, weight_gwc, stride, padding, dilation)
