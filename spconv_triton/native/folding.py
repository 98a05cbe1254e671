"""The point-wise weight of x3 inside the group-wise one, wherever a tap of the window reads the same pixels.

The point-wise convolution multiplies what the centre tap of the group-wise one does, and what it pools at stride 2 is
what four taps around the centre read. So where both lead from a channel to the same output, they are one weight,

    GWC(x3) + Wp x3 = GWC'(x3) + W' x3

and there are two ways to it, with s x s pixels pooled:

- *folded*: GWC' is the group-wise weight plus Wp's blocks on the diagonal over s^2, and W' the blocks beside it: for
  two groups half of Wp.
- *merged*: GWC' is dense, with all of Wp in it, and there is no W'. oneDNN computes with blocks of channels, so a
  layer of few channels is convolved in the same time for fewer calls.

The gradients of GWC' at these taps are, summed over them, those of Wp's blocks, but not as precise over many pixels:
without AVX-512 oneDNN adds up a tap's one by one, and at a stride they are means of larger sums. There the gradient of
Wp is a product of its own, which takes no longer than its blocks beside the diagonal and the rest of the way back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import Geometry
from .products import is_matrix_product

MERGED_CHANNELS = 16
"""Up to which x3 is one block of oneDNN's."""

FEW_PRODUCTS = 3e5
"""Multiply-accumulates by Wp up to which merging pays in a single call."""

SHORT_SUM = 1 << 10
"""Output pixels of a batch up to which the gradient of Wp is as precise in a merged weight's as by itself."""

FOLDED_PRODUCTS = 8e6
"""Multiply-accumulates that must be saved for folding to pay in a single call."""


class Block(NamedTuple):
    """A part of a point-wise weight: ``outputs`` channels from ``output`` on, by ``inputs`` channels from ``input``."""

    output: int
    outputs: int
    input: int
    inputs: int

    def of(self, weight: Tensor) -> Tensor:
        """The part of [M, C, 1, 1] or [M, C], a view [outputs, inputs]."""
        matrix = weight if weight.dim() == 2 else weight.flatten(1)
        return matrix[self.output : self.output + self.outputs, self.input : self.input + self.inputs]


def whole(weight: Tensor) -> tuple[Block, ...]:
    """A point-wise weight as one part."""
    return (Block(0, weight.shape[0], 0, weight.shape[1]),)


def own_blocks(weight_gwc: Tensor, groups: int) -> tuple[Block, ...]:
    """Wp's blocks on the diagonal: of each group's inputs and outputs."""
    outputs, inputs = weight_gwc.shape[0] // groups, weight_gwc.shape[1]
    return tuple(Block(g * outputs, outputs, g * inputs, inputs) for g in range(groups))


def other_blocks(weight_gwc: Tensor, groups: int) -> tuple[Block, ...]:
    """Wp's blocks beside the diagonal, for at most two groups."""
    own = own_blocks(weight_gwc, groups)
    return tuple(Block(*a[:2], *b[2:]) for a, b in zip(own, reversed(own), strict=True)) if groups == 2 else ()


def reads_the_same(geometry: Geometry, height: int, width: int) -> bool:
    """Whether taps read what the point-wise convolutions do, on maps of ``height`` x ``width``.

    The centre tap does. A stride needs taps next to each other and windows that are whole: others are averaged over the
    pixels that they have.
    """
    axes = zip(
        geometry.kernel_size,
        geometry.stride,
        geometry.dilation,
        geometry.centre,
        (height, width),
        geometry.output_size(height, width),
        strict=True,
    )
    return all(
        stride == 1 or (dilation == 1 and 2 * (stride - 1) < kernel and first >= 0 and first + stride * length <= size)
        for kernel, stride, dilation, first, size, length in axes
    )


def can_fold(geometry: Geometry, height: int, width: int) -> bool:
    """Whether there is a folded weight; with more groups than two, what is left of Wp is too many blocks."""
    return geometry.groups <= 2 and reads_the_same(geometry, height, width)


def is_worth_merging(weight_gwc: Tensor, geometry: Geometry, height: int, width: int) -> bool:
    """Whether a merged weight, made once for many calls, takes less time; :func:`merging_pays` is for a single one."""
    channels = weight_gwc.shape[1] * geometry.groups
    return channels <= MERGED_CHANNELS and reads_the_same(geometry, height, width)


def merging_pays(x: Tensor, weight_gwc: Tensor, geometry: Geometry) -> bool:
    """Whether merging for one call on ``x`` and its backward takes less time than it saves.

    Where maps are small the calls take the time.
    In float32 alone: a merged weight of bfloat16 would be a rounding off, and oneDNN has no float64.
    """
    height, width = x.shape[2:]
    if x.dtype != torch.float32 or not x.is_cpu or not is_worth_merging(weight_gwc, geometry, height, width):
        return False
    rows, columns = geometry.output_size(height, width)
    channels = weight_gwc.shape[1] * geometry.groups
    pixels = x.shape[0] * rows * columns
    return pixels <= SHORT_SUM and pixels * weight_gwc.shape[0] * channels <= FEW_PRODUCTS


def folding_pays(x: Tensor, weight_gwc: Tensor, geometry: Geometry) -> bool:
    """Whether folding for one call on ``x`` takes less time than it saves.

    Not of bfloat16, where the folded weight would be a rounding off, and gradients with it.
    """
    height, width = x.shape[2:]
    rows, columns = geometry.output_size(height, width)
    saved = x.shape[0] * rows * columns * weight_gwc.shape[0] * weight_gwc.shape[1]
    if saved <= FOLDED_PRODUCTS or x.dtype == torch.bfloat16 or not can_fold(geometry, height, width):
        return False
    return is_matrix_product(x, weight_gwc.shape[0] * weight_gwc.shape[1] * geometry.groups)


def fold(weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry) -> Tensor:
    """The folded GWC', [M, alpha L / G, k, k]."""
    folded = weight_gwc.clone()
    taps, share = shared_taps(folded, geometry)
    for block in own_blocks(weight_gwc, geometry.groups):
        taps.narrow(0, block.output, block.outputs).add_(block.of(weight_pwc)[:, :, None, None], alpha=share)
    return folded


def merge(weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry) -> Tensor:
    """The merged GWC', [M, alpha L, k, k], in channels_last."""
    outputs, channels = weight_pwc.shape[:2]
    merged = weight_gwc.new_zeros((outputs, *weight_gwc.shape[2:], channels)).permute(0, 3, 1, 2)
    _on_the_diagonal(merged, geometry.groups).copy_(weight_gwc.unflatten(0, (geometry.groups, -1)).movedim(0, -1))
    taps, share = shared_taps(merged, geometry)
    taps.add_(weight_pwc, alpha=share)
    return merged


def part_gradient(merged: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """From the gradient of the merged GWC', that of the group-wise weight, and that of Wp, [M, alpha L, 1, 1]."""
    of_gwc = _on_the_diagonal(merged, geometry.groups).movedim(-1, 0).flatten(0, 1)
    taps, share = shared_taps(merged, geometry)
    return of_gwc, taps.clone() if share == 1 else taps.mean((2, 3), keepdim=True)  # autograd keeps them as they are


def _on_the_diagonal(merged: Tensor, groups: int) -> Tensor:
    """Of [M, C, k, k] what leads from each group to itself, a view [M / G, C / G, k, k, G]."""
    return merged.unflatten(1, (groups, -1)).unflatten(0, (groups, -1)).diagonal(dim1=0, dim2=2)


def shared_taps(weight: Tensor, geometry: Geometry) -> tuple[Tensor, float]:
    """The taps that read what the point-wise convolutions do, [M, C, s, s], and the share 1 / s^2 of each."""
    height, width = geometry.stride
    top, left = geometry.kernel_size[0] // 2, geometry.kernel_size[1] // 2
    return weight[:, :, top : top + height, left : left + width], 1 / (height * width)
