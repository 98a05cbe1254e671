"""The gradients over tensor-map descriptors: which layers they take, in which tiles, and their launches."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..geometry import Geometry
from ..kernels.arithmetic import cdiv
from ..kernels.backward_descriptor import input_grad_descriptor, weight_grad_descriptor
from .common import channels_last, empty_channels_last, has_tile_hardware, is_hopper, remembered
from .descriptor import DTYPES, PROGRAMS, adjacent, aligned, are_boxes, boxes, strided_boxes
from .launching import launch_untraced

WASTE = 1.35
"""How many pixels a tile of the transposed input gradient may compute for each that exists: 16 x 16 of 14 x 14 are
1.31. The other form wastes less where maps are smaller, but scales more numbers in registers."""

SINGLE_PIXELS = 1.65
"""By how much a tile of single pixels, a program of many samples, is slower than others, pixel for pixel."""

SPLIT_PIXELS = 1024
"""A part of the weight gradient's sums is over at least so many pixels: parts are written, and added up afterwards."""

LEAST = 1e-30
"""What gates are divided by, at least: all of a branch may be 0."""

REGISTERS = 128
"""Of a thread of the weight gradient at stride 2: with four more a processor runs three programs, not four."""


class Packing(NamedTuple):
    """How the weights become the one matrix that the input gradient reads; by channels alone, not by size.

    ``merge`` groups are taken as one. ``mixed``: all of them are, and a tile of 64 channels holds redundant ones too.
    """

    merge: int
    mixed: bool
    rows: int


class Prepared(NamedTuple):
    """What the input gradient reads; the kernels of :mod:`.gradients` that reduce the weight gradient write it."""

    plan: Packing
    packed: Tensor  # weights, [rows, L]
    gate: Tensor  # beta and gamma, [2, N, M] float32
    constant: Tensor  # [9, N, L] float32


class InputTile(NamedTuple):
    """A tile of dx and the block of output channels that a step sums over."""

    transposed: bool
    block_n: int
    block_h: int
    block_w: int
    block_c: int
    block_k: int
    num_warps: int
    num_stages: int


class WeightTile(NamedTuple):
    """A tile of dW."""

    block_co: int
    block_c: int
    num_warps: int
    num_stages: int


def can_run(x: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry) -> bool:
    """Whether the device of ``x`` has what the kernels are made for, and they compute the layer's gradients."""
    return has_tile_hardware(x) and supports(x, weight_gwc, weight_pwc, geometry)


def supports(x: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry) -> bool:
    """Whether the kernels compute this layer's gradients, on whatever device; what is unaligned is copied."""
    if x.dtype not in DTYPES or not are_boxes(x, geometry):
        return False
    return packing(x.shape[1], weight_pwc.shape[1], weight_gwc.shape[0], geometry.groups) is not None


@remembered
def packing(channels: int, representative: int, outputs: int, groups: int) -> Packing | None:
    """The fewest groups merged whose channels come in blocks of 64, a tensor core's rows; the most that fit where none
    do; None where not even blocks of 16 fit.

    Merging adds zeros to multiply, but a narrower tile takes as many instructions as one of 64 channels.
    """
    fitting = [
        merge
        for merge in range(1, groups + 1)
        if groups % merge == 0
        and outputs // groups * merge % 64 == 0
        and channels > representative
        and gcd(representative // groups * merge, channels - representative) % 16 == 0
    ]
    if not fitting:
        return None
    wide = [merge for merge in fitting if gcd(representative // groups * merge, channels - representative) % 64 == 0]
    merge = (wide or fitting[-1:])[0]
    mixed = not wide and merge == groups and channels % 64 == 0
    return Packing(merge, mixed, outputs + 8 * (outputs // groups * merge))


def waste(box: tuple[int, ...], sizes: tuple[int, ...]) -> float:
    """Elements that boxes compute for each that exists."""
    computed = 1.0
    for side, size in zip(box, sizes, strict=True):
        computed *= cdiv(size, side) * side / size
    return computed


@remembered
def input_tile(
    plan: Packing, shape: tuple[int, int, int, int], representative: int, groups: int, stride: int
) -> InputTile:
    """The tile of the input gradient; the numbers behind the choice were measured on an H200, at stride 1.

    ``shape`` is N, channels of x, and H and W of the output, which each phase of a stride has the size of.

    Where pixels of one sample fill a tile (56 x 56 to 14 x 14) the gate multiplies the weights, if 64 channels fill the
    tensor core's rows; elsewhere it multiplies g, and boxes of several samples leave less over. Tiles of single pixels
    skip the taps outside the image, but read the gate for each pixel, so they are for maps of 1 x 1 and 2 x 2. Where
    programs are few, smaller tiles make more of them.
    """
    batch, channels, height, width = shape
    computed = channels + (stride**2 - 1) * representative  # channels, once for each phase
    group = representative // groups * plan.merge
    block_c = gcd(128, group, channels - representative)
    if plan.mixed or block_c >= 64:
        box = min([(4, 32), (8, 16), (16, 8)], key=lambda box: waste(box, (height, width)))
        if waste(box, (height, width)) <= WASTE:
            few = batch * cdiv(height, box[0]) * cdiv(width, box[1]) * computed // 64 <= PROGRAMS // 2
            box = (8, 8) if few else box
            return InputTile(True, 1, *box, 64, 64, 4, 4 if few else 3)
    samples = [(4, 4, 4), (16, 2, 2), (64, 1, 1)]
    outside = 2 if stride == 1 else 1  # of the taps along an axis, those of one pixel each
    taps = (3 - outside / height) * (3 - outside / width) / 9  # those inside the image, on average
    best = min(
        samples, key=lambda box: waste(box[1:], (height, width)) * (SINGLE_PIXELS * taps if box[1:] == (1, 1) else 1.0)
    )
    programs = cdiv(batch, best[0]) * cdiv(height, best[1]) * cdiv(width, best[2]) * computed // block_c
    if best == samples[0] and programs <= PROGRAMS:
        return InputTile(False, *best, min(block_c, 64), 64, 4, 4)
    return InputTile(False, *best, block_c, 64, 4, 3)


@remembered
def weight_tile(plan: Packing, channels: int, representative: int, outputs: int, groups: int) -> WeightTile:
    """The tile of the weight gradient: what an H200 finds the fastest nearly everywhere, four programs a processor; not
    by size, for it decides the shapes of buffers."""
    group, group_outputs = (c // groups * plan.merge for c in (representative, outputs))
    block_co = gcd(64, group_outputs)
    block_c = gcd(64, group, representative, channels - representative)
    return WeightTile(block_co, block_c, 4, 3 if block_c == 64 else 4)


@remembered
def weight_box(height: int, width: int) -> tuple[int, int]:
    """64 pixels of one sample to sum over in a step, in the shape that leaves the least over."""
    return min([(8, 8), (4, 16), (16, 4), (2, 32), (1, 64)], key=lambda box: waste(box, (height, width)))


def weight_grad(
    grad: Tensor,
    x: Tensor,
    pooled: Tensor | None,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    ratio: Tensor,
    groups: int,
    stride: int,
) -> tuple[Tensor, Tensor]:
    """As :func:`.gradients.layer_weight_grad`, of a layer that is supported; at stride 1 the centre tap's partial sums
    are left out, being the point-wise ones.

    Args:
        pooled: as :func:`.gradients.pooled_windows` makes it; None at stride 1.
    """
    channels, (height, width) = x.shape[1], grad.shape[2:]
    outputs, representative = weight_pwc.shape[:2]
    plan, tile = _weight_plan(x, weight_pwc, groups)
    partial, parts = _weight_buffers(grad, x, weight_pwc, groups, stride)
    k_tiles, batch, slices, _ = parts.shape
    units, splits = batch * slices, partial.shape[0]
    block_h, block_w = weight_box(height, width)
    box = [1, block_h, block_w, tile.block_c]
    read = boxes(*aligned(x), box) if pooled is None else strided_boxes(adjacent(x), box)
    launch_untraced(
        weight_grad_descriptor,
        (k_tiles * outputs // tile.block_co, splits),
        boxes(*aligned(grad), [1, block_h, block_w, tile.block_co]),
        read,
        read if pooled is None else boxes(*aligned(pooled), box),
        channels_last(weight_gwc),
        weight_pwc.contiguous(),
        weight_redundant.contiguous(),
        ratio,
        partial,
        parts,
        units,
        cdiv(units, splits),
        slices,
        cdiv(cdiv(height, slices), block_h) * block_h,
        width,
        C=channels,
        CR=representative,
        CO=outputs,
        G=groups,
        MERGE=plan.merge,
        STRIDE=stride,
        BLOCK_H=block_h,
        BLOCK_W=block_w,
        BLOCK_CO=tile.block_co,
        BLOCK_C=tile.block_c,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=REGISTERS if stride == 2 and tile.block_co * tile.block_c <= 64 * 64 else None,
    )
    return partial, parts


def empty_weight_grad(
    grad: Tensor,
    x: Tensor,
    _pooled: Tensor | None,
    _weight_gwc: Tensor,
    weight_pwc: Tensor,
    _weight_redundant: Tensor,
    _ratio: Tensor,
    groups: int,
    stride: int,
) -> tuple[Tensor, Tensor]:
    """What :func:`weight_grad` returns, uninitialised."""
    return _weight_buffers(grad, x, weight_pwc, groups, stride)


def redundant_tiles(x: Tensor, weight_pwc: Tensor, groups: int) -> int:
    """How many of the K tiles, the first ones, make A1."""
    return (x.shape[1] - weight_pwc.shape[1]) // _weight_plan(x, weight_pwc, groups)[1].block_c


def _weight_plan(x: Tensor, weight_pwc: Tensor, groups: int) -> tuple[Packing, WeightTile]:
    outputs, representative = weight_pwc.shape[:2]
    plan = _packing(x.shape[1], representative, outputs, groups)
    return plan, weight_tile(plan, x.shape[1], representative, outputs, groups)


def _weight_buffers(grad: Tensor, x: Tensor, weight_pwc: Tensor, groups: int, stride: int) -> tuple[Tensor, Tensor]:
    """Uninitialised partial sums [splits, weights] and parts of A [K tiles, N, slices, M], float32."""
    batch, outputs, height, width = grad.shape
    channels, representative = x.shape[1], weight_pwc.shape[1]
    plan, tile = _weight_plan(x, weight_pwc, groups)
    taps = 8 if stride == 1 else 9
    k_tiles = (channels + taps * (representative // groups * plan.merge)) // tile.block_c
    # Whole waves of programs that fill a large GPU; a slice lies within one sample, for the gate's sake.
    splits = PROGRAMS * 8 // tile.num_warps // (k_tiles * outputs // tile.block_co)
    splits = max(1, min(splits, cdiv(batch * height * width, SPLIT_PIXELS)))
    slices = cdiv(splits, batch)
    units = batch * slices
    splits = cdiv(units, cdiv(units, splits))
    weights = outputs * (channels + taps * (representative // groups))
    partial = x.new_empty((splits, weights), dtype=torch.float32)
    return partial, x.new_empty((k_tiles, batch, slices, outputs), dtype=torch.float32)


def prepare(x: Tensor, weight_pwc: Tensor, groups: int) -> Prepared:
    """Uninitialised."""
    batch, channels = x.shape[:2]
    outputs, representative = weight_pwc.shape[:2]
    plan = _packing(channels, representative, outputs, groups)
    gate, constant = (x.new_empty(shape, dtype=torch.float32) for shape in ((2, batch, outputs), (9, batch, channels)))
    return Prepared(plan, x.new_empty((plan.rows, channels)), gate, constant)


def input_grad(
    grad: Tensor, packed: Tensor, gate: Tensor, constant: Tensor, representative: int, groups: int, stride: int
) -> Tensor:
    """dL/dx, [N, C, H, W], channels_last, of a layer that is supported.

    Args:
        packed, gate, constant: see :class:`Prepared`.

    In float16 the kernel that multiplies the weights by a gate gets each sample's as parts of the largest one.
    """
    dx = empty_input_grad(grad, packed, gate, constant, representative, groups, stride)
    batch, outputs, height, width = grad.shape
    channels = packed.shape[1]
    plan = _packing(channels, representative, outputs, groups)
    tile = input_tile(plan, (batch, channels, height, width), representative, groups, stride)
    box = [tile.block_n, tile.block_h, tile.block_w]
    tiles_h, tiles_w = cdiv(height, tile.block_h), cdiv(width, tile.block_w)
    blocks = channels // tile.block_c + (stride**2 - 1) * cdiv(representative, tile.block_c)
    dx_box = [*box, tile.block_c]
    largest = gate
    if tile.transposed and packed.dtype == torch.float16:
        largest = gate.amax(2, keepdim=True).clamp_(min=LEAST)
        gate = gate / largest
    launch_untraced(
        input_grad_descriptor,
        (cdiv(batch, tile.block_n) * tiles_h * tiles_w * blocks,),
        boxes(*aligned(grad), [*box, tile.block_k]),
        TensorDescriptor.from_tensor(packed, [tile.block_k, tile.block_c]),
        TensorDescriptor.from_tensor(gate, [1, tile.block_n, tile.block_k]),
        largest,
        constant,
        boxes(dx, channels, dx_box) if stride == 1 else strided_boxes(dx, dx_box),
        batch,
        height,
        width,
        tiles_h,
        tiles_w,
        C=channels,
        CR=representative,
        CO=outputs,
        G=groups,
        MERGE=plan.merge,
        MIXED=plan.mixed,
        STRIDE=stride,
        TRANSPOSED=tile.transposed,
        HOPPER=is_hopper(grad),
        BLOCK_N=tile.block_n,
        BLOCK_H=tile.block_h,
        BLOCK_W=tile.block_w,
        BLOCK_C=tile.block_c,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return dx


def empty_input_grad(
    grad: Tensor, packed: Tensor, _gate: Tensor, _constant: Tensor, _representative: int, _groups: int, stride: int
) -> Tensor:
    """What :func:`input_grad` returns, uninitialised."""
    return empty_channels_last(grad, packed.shape[1], grad.shape[2] * stride, grad.shape[3] * stride)


def _packing(channels: int, representative: int, outputs: int, groups: int) -> Packing:
    plan = packing(channels, representative, outputs, groups)
    if plan is None:
        raise ValueError(
            f"no tile takes {channels} channels, {representative} of them in {groups} groups, to {outputs}"
        )
    return plan
