"""The convolution over tensor-map descriptors: which layers it takes, in which tiles, and its launch."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch._library.triton import is_wrap_triton_enabled
from triton.tools.tensor_descriptor import TensorDescriptor

from ..geometry import Geometry
from ..kernels.arithmetic import cdiv
from ..kernels.descriptor import onepass_descriptor as kernel
from .common import (
    can_overlap,
    channels_last,
    dot_precision,
    empty_channels_last,
    has_tile_hardware,
    pixel_major,
    remembered,
)
from .launching import launch_untraced

DTYPES = (torch.float16, torch.bfloat16)

PROGRAMS = 264
"""How many programs run at a time: two on each of an H100's 132 processors."""

L2_BYTES = 24
"""What an H100's processor gets of the L2 cache in a cycle."""

PRODUCTS = 1700
"""Multiply-adds of half precision that it makes in a cycle: 798 TFLOP/s over all, where its data sheet has 2048."""

BOXES = ((2, 2), (4, 4), (8, 8), (8, 16), (16, 16))
"""Rows and columns of a tile. 56, 28 and 14 are multiples of 8, 4 and 2, where 8 x 16 wastes an eighth and more."""


class Packing(NamedTuple):
    """How a layer's weights become one matrix [M, columns]."""

    merge: int
    block_k: int
    pointwise: int  # columns of W1 and of what of Wp is not folded into a tap
    per_tap: int

    @property
    def columns(self) -> int:
        return self.pointwise + 9 * self.per_tap


class Tile(NamedTuple):
    """A tile of the output, BLOCK_N x BLOCK_H x BLOCK_W pixels by BLOCK_CO channels, and how it is computed."""

    block_n: int
    block_h: int
    block_w: int
    block_co: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def pixels(self) -> int:
        return self.block_n * self.block_h * self.block_w

    def programs(self, batch: int, height: int, width: int, outputs: int) -> int:
        """Programs that cover the output."""
        blocks = zip((batch, height, width, outputs), self[:4], strict=True)
        return functools.reduce(lambda total, sides: total * cdiv(*sides), blocks, 1)


def can_run(x: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry) -> bool:
    """Whether the device of ``x`` has what the kernel is made for, and it computes the layer."""
    return has_tile_hardware(x) and supports(x, weight_gwc, weight_pwc, geometry)


def supports(x: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry) -> bool:
    """Whether the kernel computes this layer, on whatever device.

    Float32 only where it is multiplied as TF32. Alignment is no matter: with the channels that :func:`packing` takes a
    fresh tensor is aligned, and an unaligned one is copied.
    """
    if x.dtype not in DTYPES and dot_precision(x) != "tf32":
        return False
    if not are_boxes(x, geometry):
        return False
    return packing(x.shape[1], weight_pwc.shape[1], weight_gwc.shape[0], geometry.groups) is not None


def are_boxes(x: Tensor, geometry: Geometry) -> bool:
    """Whether what each tap reads of ``x`` is a moved box: 3 x 3, padding 1, stride 1, or 2 on even sizes."""
    if (geometry.kernel_size, geometry.padding, geometry.dilation) != ((3, 3), (1, 1), (1, 1)):
        return False
    if geometry.stride == (2, 2):
        return x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0
    return geometry.stride == (1, 1)


@remembered
def packing(channels: int, representative: int, outputs: int, groups: int) -> Packing | None:
    """The fewest groups merged that fill a tile of 64 output channels and blocks of at least 16 input channels.

    Below 64 output channels the product is not a warp-group's; each merged group adds zeros to multiply. None where no
    merging fits.
    """
    redundant = channels - representative
    for merge in range(1, groups + 1):
        group = representative // groups * merge
        if groups % merge or outputs // groups * merge % 64 or redundant == 0:
            continue
        for block_k in (128, 64, 32, 16):
            if not (group % block_k or redundant % block_k or (representative - group) % block_k):
                return Packing(merge, block_k, channels - group, group)
    return None


def tiles(packed: Packing, outputs: int, groups: int) -> list[Tile]:
    """Every tile that a layer may get, the largest first.

    Two programs share a processor, so each takes at most 128 registers a thread at 8 warps or 255 at 4, and half of the
    shared memory. Samples have a column of the gate each in registers, hence the fewer the more pixels there are.
    (A residual takes more: 146 at 8 warps.)
    """
    if outputs // groups * packed.merge % 128 == 0:
        shapes = [(128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (64, 64, 64, 4, 4)]
    else:
        shapes = [(256, 64, 32, 4, 4), (128, 64, 64, 4, 3), (64, 64, 64, 4, 4)]
    return [
        Tile(pixels // (rows * columns), rows, columns, block_co, min(block_k, packed.block_k), warps, stages)
        for pixels, block_co, block_k, warps, stages in shapes
        for rows, columns in BOXES
        if 1 <= pixels // (rows * columns) <= 4096 // pixels
    ]


def cycles(tile: Tile, packed: Packing, stride: int, output: tuple[int, int, int, int]) -> float:
    """What a launch is taken to last: its reads through the L2 cache, then its products, for as many programs in a row
    as one of PROGRAMS places gets.

    So it weighs small tiles, which read more, against large ones that leave processors idle, and what a tile wastes
    beyond the edges of the output against what many samples read of the gate.

    Args:
        output: N, H_out, W_out, M.
    """
    depth = packed.pointwise * stride**2 + packed.per_tap * 9
    read = 2 * depth * (tile.pixels + tile.block_co) + 3 * 4 * tile.block_n * tile.block_co
    program = read / L2_BYTES + depth * tile.pixels * tile.block_co / PRODUCTS
    return program * max(1.0, tile.programs(*output) / PROGRAMS)


@remembered
def best_tile(packed: Packing, groups: int, stride: int, output: tuple[int, int, int, int]) -> Tile:
    """The tile of the fewest cycles, the larger of equals, for N, H_out, W_out, M.

    A program that has its processor almost to itself has time to wait for memory, and room to load further ahead; one
    that has it all to itself, for longer steps: an H200 takes a fifth less for 512 channels, whose steps wait longest.
    """
    best = min(tiles(packed, output[3], groups), key=lambda tile: cycles(tile, packed, stride, output))
    programs = best.programs(*output)
    if not best.pixels == best.block_co == 64 or programs > PROGRAMS:
        return best
    if packed.block_k == 128 and programs <= PROGRAMS // 2:
        return best._replace(block_k=128, num_stages=4)
    return best._replace(num_stages=6)


def convolve(
    x: Tensor,
    packed: Tensor,
    ratio: Tensor,
    scale: Tensor,
    offset: Tensor,
    residual: Tensor | None,
    representative: int,
    groups: int,
    stride: int,
    activation: str,
) -> Tensor:
    """Y [N, M, H_out, W_out], channels_last, of a layer that :func:`supports` takes.

    In eager mode, with few samples, the kernel begins while the one ahead of it runs, and reads ``x`` and ``packed``
    before it waits: they have to be there when that one stops waiting (see :mod:`..kernels.overlap`), as they are
    behind the gate's launch. So it does not where ``x`` is copied first, nor as an operator, in a graph or called by
    others: what is ahead of it there may be what writes ``x``. (A residual is read after the wait.)

    Args:
        x: [N, L, H, W].
        packed: [M, columns], as the statistics' launch wrote it.
        ratio, scale, offset: [N, M] float32, as the gate's did, right before.
        residual: [N, M, H_out, W_out], added to the output.
        representative, groups, stride: alpha L, G and the stride of the layer.
        activation: ``"none"``, ``"relu"``, ``"relu6"`` or ``"silu"``, after the residual.
    """
    batch, channels, height, width = x.shape
    outputs, size = packed.shape[0], (batch, height // stride, width // stride)
    plan = packing(channels, representative, outputs, groups)
    if plan is None:
        raise ValueError(
            f"no tile takes {channels} channels, {representative} of them in {groups} groups, to {outputs}"
        )
    y = empty_channels_last(x, outputs, *size[1:])
    tile = best_tile(plan, groups, stride, (*size, outputs))
    box, pixel_box = tile[:3], [*tile[:3], tile.block_co]
    block_k = input_block(tile, x.dtype)
    read, spacing = (adjacent(x), channels) if stride == 2 else aligned(x)
    y_boxes = boxes(y, outputs, pixel_box)
    launch_untraced(
        kernel,
        (tile.programs(*size, outputs),),
        strided_boxes(read, [*box, block_k]) if stride == 2 else boxes(read, spacing, [*box, block_k]),
        TensorDescriptor.from_tensor(packed, [tile.block_co, block_k]),
        ratio,
        scale,
        offset,
        y_boxes if residual is None else boxes(*aligned(residual), pixel_box),
        y_boxes,
        *size,
        C=channels,
        CR=representative,
        CO=outputs,
        G=groups,
        MERGE=plan.merge,
        STRIDE=stride,
        PRECISION=dot_precision(x),
        RESIDUAL=residual is not None,
        ACTIVATION=activation,
        OVERLAP=can_overlap(x) and read is x and not is_wrap_triton_enabled(),
        BLOCK_N=tile.block_n,
        BLOCK_H=tile.block_h,
        BLOCK_W=tile.block_w,
        BLOCK_CO=tile.block_co,
        BLOCK_K=block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y


def empty_convolved(
    x: Tensor,
    packed: Tensor,
    _ratio: Tensor,
    _scale: Tensor,
    _offset: Tensor,
    _residual: Tensor | None,
    _representative: int,
    _groups: int,
    stride: int,
    _activation: str,
) -> Tensor:
    """What :func:`convolve` returns, uninitialised."""
    return empty_channels_last(x, packed.shape[0], x.shape[2] // stride, x.shape[3] // stride)


def describe(
    x: Tensor,
    packed: Tensor,
    _ratio: Tensor,
    _scale: Tensor,
    _offset: Tensor,
    _residual: Tensor | None,
    representative: int,
    groups: int,
    stride: int,
    _activation: str,
) -> str:
    """What :func:`convolve` launches: tile and grid."""
    outputs, output = packed.shape[0], (x.shape[0], x.shape[2] // stride, x.shape[3] // stride, packed.shape[0])
    plan = packing(x.shape[1], representative, outputs, groups)
    assert plan is not None
    merged = f", {plan.merge} groups merged" if plan.merge > 1 else ""
    tile = best_tile(plan, groups, stride, output)
    return (
        f"{tile.block_n} samples x {tile.block_h} x {tile.block_w} pixels x {tile.block_co} channels, "
        f"BLOCK_K={input_block(tile, x.dtype)}, {tile.num_warps} warps, {tile.num_stages} stages, "
        f"grid ({tile.programs(*output)},){merged}"
    )


def input_block(tile: Tile, dtype: torch.dtype) -> int:
    """Input channels of a step: in float32 half as many, which are as many bytes, but no fewer than 16."""
    return max(16, tile.block_k * 2 // dtype.itemsize)


def aligned(x: Tensor) -> tuple[Tensor, int]:
    """``x`` and the distance of its pixels; a copy unless both lie on 16 bytes, as descriptors want, and apart."""
    x, spacing = pixel_major(x)
    if x.data_ptr() % 16 or spacing * x.itemsize % 16 or spacing < x.shape[1]:
        x, spacing = x.clone(memory_format=torch.channels_last), x.shape[1]
    return x, spacing


def boxes(x: Tensor, spacing: int, box: list[int]) -> TensorDescriptor:
    """[N, H, W, C]. Strides are computed: those of an axis of one element may be anything."""
    batch, channels, height, width = x.shape
    strides = [height * width * spacing, width * spacing, spacing, 1]
    return TensorDescriptor(x, [batch, height, width, channels], strides, box)


def adjacent(x: Tensor) -> Tensor:
    """``x`` as :func:`strided_boxes` wants it: a slice of channels is copied."""
    x, spacing = aligned(x)
    return x if spacing == x.shape[1] else channels_last(x)


def strided_boxes(x: Tensor, box: list[int]) -> TensorDescriptor:
    """[N, H / 2, 2, W / 2, 2 C] of an ``x`` whose pixels are next to each other."""
    batch, channels, height, width = x.shape
    shape = [batch, height // 2, 2, width // 2, 2 * channels]
    strides = [height * width * channels, 2 * width * channels, width * channels, 2 * channels, 1]
    return TensorDescriptor(x, shape, strides, [*box[:2], 1, *box[2:]])
