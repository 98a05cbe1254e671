"""The weights of a layer on ATen and the products with them: as they are given, or prepared for many inferences.

Prepared, they lie in the order in which oneDNN computes; else every call reorders them, which for the deep layers of a
network, whose weights are many and maps small, takes as long as the products. And there are less of them. At stride 1
the point-wise convolution multiplies what the centre tap of the group-wise one does, so where both lead from one group
of channels to the same output, their weights are one weight:

    GWC(x3) + Wp x3 = GWC'(x3) + W' x3

with GWC' the group-wise weight plus Wp's blocks on the diagonal in its centre tap, and W' the blocks off the diagonal:
for two groups half of Wp.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import native
from .geometry import Geometry
from .native_convolution import (
    add_convolution,
    are_of_onednn,
    are_readable,
    channels_last,
    convolve,
    is_matrix_product,
    pointwise,
    representative,
)
from .native_gate import GATE_FIRST, difference_of_means, gate_difference, gate_weights

AVAILABLE = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name)
    for name in (
        "_convolution_pointwise",
        "_linear_pointwise",
        "_reorder_convolution_weight",
        "_reorder_linear_weight",
    )
)

FOLDED_GATE_FIRST = 8
"""As :data:`.native_gate.GATE_FIRST`, where the branches are made with half of Wp."""

LARGE_PRODUCT = 16e6
"""Multiply-accumulates from which oneDNN's matrix product, which copies a slice of channels, takes less time."""


class Weights:
    """The weights of a layer, and its window.

    Args:
        gwc: [M, alpha L / G, k, k].
        pwc: [M, alpha L, 1, 1].
        redundant: [M, L - alpha L, 1, 1]; None where alpha = 1.
        geometry: of the layer.
    """

    gate_first = GATE_FIRST
    """Output pixels per input channel above which the gate comes first."""

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

    def convolve(self, x: Tensor) -> Tensor:
        """GWC(x3) as a new tensor, in the dtype of maps."""
        return self._convolve(x, None)

    def u3(self, x: Tensor, z: Tensor, bias: Tensor | None) -> Tensor:
        """U3 + bias as a new tensor, in the dtype of maps.

        Args:
            x: [N, L, H, W].
            z: of :meth:`pointwise_input`.
            bias: [M] or None, dtype of ``x``.
        """
        y = self._convolve(x, bias)
        return add_convolution(y, z.narrow(1, 0, self.pwc.shape[1]), self.pwc)

    def u1(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """U1 + bias, likewise."""
        representative, redundant = self.pwc.shape[1], self.redundant.shape[1]
        return pointwise(z.narrow(1, representative, redundant), self.redundant, bias)

    def gate_difference(self, gwc: Tensor, z: Tensor) -> Tensor:
        """S3 - S1 without biases, [N, M, 1, 1], from GWC(x3) and the input of the point-wise convolutions."""
        return gate_difference(gwc, z, self.pwc, self.redundant)

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x3, window = representative(x, self.gwc, self.geometry)
        return convolve(x3, self.gwc, bias, *window)


class PreparedWeights(Weights):
    """Float32 or bfloat16 weights on a CPU, with what inference computes from them, made when first asked for.

    They are for every ``x`` that :func:`are_preparable` with them.
    """

    def __init__(self, gwc: Tensor, pwc: Tensor, redundant: Tensor | None, geometry: Geometry) -> None:
        super().__init__(gwc, pwc, redundant, geometry)
        self._folds = geometry.is_centred and geometry.stride == (1, 1) and geometry.groups <= 2
        if self._folds:
            self.gate_first = FOLDED_GATE_FIRST

    def u3(self, x: Tensor, z: Tensor, bias: Tensor | None) -> Tensor:
        if not self._folds:
            return super().u3(x, z, bias)
        y = self._convolve_packed(self._folded, x, bias)
        for outputs, inputs, weight in self._across_groups:
            _columns(y, outputs, weight.shape[1]).addmm_(_columns(x, inputs, weight.shape[0]), weight)
        return y

    def u1(self, z: Tensor, bias: Tensor | None) -> Tensor:
        batch, _, height, width = z.shape
        columns = _columns(z, self.pwc.shape[1], self.redundant.shape[1])
        if batch * height * width * self.redundant.numel() > LARGE_PRODUCT:
            y = torch.ops.mkldnn._linear_pointwise.default(columns, self._packed_redundant, bias, "none", [], "")
        elif bias is None:
            y = torch.mm(columns, self._turned_redundant)
        else:
            y = torch.addmm(bias, columns, self._turned_redundant)
        outputs = y.shape[1]
        row = width * outputs
        return y.as_strided((batch, outputs, height, width), (height * row, 1, row, outputs))

    def gate_difference(self, gwc: Tensor, z: Tensor) -> Tensor:
        return difference_of_means(gwc, z, self._gate_weights)

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolve_packed(self._packed, x, bias)

    def _convolve_packed(self, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        x3, (stride, padding, dilation, groups) = representative(x, self.gwc, self.geometry)
        y = torch.ops.mkldnn._convolution_pointwise.default(
            x3, weight, bias, padding, stride, dilation, groups, "none", [], ""
        )
        return channels_last(y)  # which it is, unless x3 has a single channel

    @functools.cached_property
    def _packed(self) -> Tensor:
        return self._pack(self.gwc)

    @functools.cached_property
    def _folded(self) -> Tensor:
        """GWC' of the module's docstring."""
        outputs, channels, *kernel = self.gwc.shape
        groups = self.geometry.groups
        blocks = self.pwc.reshape(groups, outputs // groups, groups, channels)
        folded = self.gwc.clone()
        folded[:, :, kernel[0] // 2, kernel[1] // 2] += blocks.diagonal(0, 0, 2).permute(2, 0, 1).flatten(0, 1)
        return self._pack(folded)

    @functools.cached_property
    def _across_groups(self) -> list[tuple[int, int, Tensor]]:
        """W': first output, first input, and weight [inputs, outputs] of each block."""
        if self.geometry.groups == 1:
            return []
        outputs, inputs = self.pwc.shape[0] // 2, self.pwc.shape[1] // 2
        weight = self.pwc.flatten(1).t()
        return [
            (0, inputs, weight[inputs:, :outputs].contiguous()),
            (outputs, 0, weight[:inputs, outputs:].contiguous()),
        ]

    @functools.cached_property
    def _packed_redundant(self) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.redundant.flatten(1).contiguous(), None)

    @functools.cached_property
    def _turned_redundant(self) -> Tensor:
        return self.redundant.flatten(1).t()

    @functools.cached_property
    def _gate_weights(self) -> Tensor:
        return gate_weights(self.pwc, self.redundant)

    def _pack(self, weight: Tensor) -> Tensor:
        _, stride, padding, dilation, groups = self.geometry  # the order is the same for wider rows
        return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, None)


def prepare(x: Tensor, gwc: Tensor, pwc: Tensor, redundant: Tensor | None, geometry: Geometry) -> Weights:
    """The weights for an inference on ``x``, prepared where that is possible; they keep none of the autograd graph."""
    kind = PreparedWeights if are_preparable(x, gwc, geometry) else Weights
    return kind(gwc.detach(), pwc.detach(), None if redundant is None else redundant.detach(), geometry)


def are_preparable(x: Tensor, weight_gwc: Tensor, geometry: Geometry) -> bool:
    """Whether oneDNN computes with prepared weights what it would with given ones, for this ``x``."""
    if not (AVAILABLE and are_of_onednn(x) and x.numel() > 0 and is_matrix_product(x)):
        return False
    _, stride, padding, dilation, groups = geometry
    x3 = x.narrow(1, 0, weight_gwc.shape[1] * groups)
    return torch._C._get_mkldnn_enabled() and are_readable(x3, weight_gwc, stride, padding, dilation)


def _columns(x: Tensor, first: int, count: int) -> Tensor:
    """Channels of [N, C, H, W] in channels_last, dense, as [N H W, count]: one view instead of four."""
    batch, channels, height, width = x.shape
    return x.as_strided((batch * height * width, count), (channels, 1), x.storage_offset() + first)
