"""The two sums that every forward kernel is made of: a point-wise convolution, and the taps of a group-wise one.

Weights are read as they are stored, inputs next to each other: [CO, C] for a point-wise weight, [CO, KH, KW, CG]
(channels_last) for the group-wise one.
"""

import triton
import triton.language as tl

from .tiles import decode_pixels, dot, inside, load_pooled, pixel_pointers


@triton.jit
def output_block(
    pixels,
    HO,
    WO,
    CO: tl.constexpr,
    G: tl.constexpr,
    BLOCK_PIX: tl.constexpr,
    BLOCK_CO: tl.constexpr,
):
    """The output channels and pixels of a program, output channels of a group fastest.

    Returns the group, co and its mask [BLOCK_CO], and pixel, its mask, sample, row and column [BLOCK_PIX].
    """
    COG: tl.constexpr = CO // G
    CO_BLOCKS: tl.constexpr = (COG + BLOCK_CO - 1) // BLOCK_CO
    pid = tl.program_id(0)
    group = pid // CO_BLOCKS % G
    in_group = pid % CO_BLOCKS * BLOCK_CO + tl.arange(0, BLOCK_CO)
    pixel = pid // (CO_BLOCKS * G) * BLOCK_PIX + tl.arange(0, BLOCK_PIX)
    sample, row, column = decode_pixels(pixel, HO, WO)
    return group, group * COG + in_group, in_group < COG, pixel, pixel < pixels, sample, row, column


@triton.jit
def add_pointwise(
    acc,  # [BLOCK_PIX, BLOCK_CO] float32
    x_ptr,  # [N, H, W, ...], at the first channel of the sum; pixels x_stride apart
    weight_ptr,  # [CO, CHANNELS]
    sample,  # [BLOCK_PIX]
    out_row,  # [BLOCK_PIX]
    out_column,  # [BLOCK_PIX]
    in_range,  # [BLOCK_PIX]
    co,  # [BLOCK_CO]
    co_mask,  # [BLOCK_CO]
    H,
    W,
    x_stride,
    CHANNELS,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    CENTRE_H: tl.constexpr,
    CENTRE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + pool(x) weight^T, at the centre taps of the output pixels."""
    row = out_row * STRIDE_H + CENTRE_H
    column = out_column * STRIDE_W + CENTRE_W
    pointers = pixel_pointers(x_ptr, sample, row, column, H, W, x_stride)
    weights = weight_ptr + co[:, None] * CHANNELS
    c = tl.arange(0, BLOCK_C)
    # A pooled tile is many loads: pipelining them would take as many times the shared memory.
    STAGES: tl.constexpr = None if STRIDE_H * STRIDE_W == 1 else 1
    for c0 in tl.range(0, CHANNELS, BLOCK_C, num_stages=STAGES):
        c_mask = c0 + c < CHANNELS
        x = load_pooled(pointers, row, column, in_range, c0 + c, c_mask, H, W, x_stride, STRIDE_H, STRIDE_W)
        w = tl.load(weights + (c0 + c)[None, :], mask=co_mask[:, None] & c_mask[None, :], other=0.0)
        acc = dot(x, tl.trans(w), acc, PRECISION)
    return acc


@triton.jit
def add_taps(
    acc,  # [BLOCK_PIX, BLOCK_CO] float32
    x_ptr,  # [N, H, W, ...], at the first channel of the group; pixels x_stride apart
    weight_ptr,  # [CO, KH, KW, CG]
    sample,  # [BLOCK_PIX]
    out_row,  # [BLOCK_PIX]
    out_column,  # [BLOCK_PIX]
    in_range,  # [BLOCK_PIX]
    co,  # [BLOCK_CO]
    co_mask,  # [BLOCK_CO]
    H,
    W,
    x_stride,
    CG: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + sum over the taps of x at the tap times the tap's weight, for output channels of one group."""
    C_BLOCKS: tl.constexpr = (CG + BLOCK_C - 1) // BLOCK_C
    row = out_row * STRIDE_H - PAD_H
    column = out_column * STRIDE_W - PAD_W
    pointers = pixel_pointers(x_ptr, sample, row, column, H, W, x_stride)
    weights = weight_ptr + co[:, None] * (KH * KW * CG)
    c = tl.arange(0, BLOCK_C)
    for step in range(0, KH * KW * C_BLOCKS):
        tap = step // C_BLOCKS
        c0 = step % C_BLOCKS * BLOCK_C
        dy = tap // KW * DILATION_H
        dx = tap % KW * DILATION_W
        c_mask = c0 + c < CG
        valid = in_range & inside(row + dy, column + dx, H, W)
        offset = (dy * W + dx).to(tl.int64) * x_stride + c0
        x = tl.load(pointers[:, None] + offset + c[None, :], mask=valid[:, None] & c_mask[None, :], other=0.0)
        w = tl.load(weights + (tap * CG + c0 + c)[None, :], mask=co_mask[:, None] & c_mask[None, :], other=0.0)
        acc = dot(x, tl.trans(w), acc, PRECISION)
    return acc
