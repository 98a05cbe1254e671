"""Sums of x over the pixels that each tap reads, from one read of x.

    win[n, tap, c] = sum_{p in output} x[n, p at tap, c]          (pixels outside the image count as 0)
    pool[n, c]     = sum_{p in output} pool(x)[n, p, c]           (at stride 1 this is the centre tap's win)

Both are sums over pixels with weights that do not depend on n or c, so a block of pixels contributes one small matrix
product: [rows, pixels] weights times [pixels, channels] of x. That holds for any kernel size, stride, padding and
dilation. The weights of win are 0 or 1. Those of pool are 1 / (valid pixels of the window), which half precision may
not hold, so they are split into a high and a low part, a row each.

At stride 1 all taps read the inner pixels, so all sums are the total of all pixels, whose weights are 1 and need no
computing, less what some tap does not read of the pixels along the edges.
"""

import triton
import triton.language as tl

from .tiles import dot, pixel_pointers, window_overlap
from .tuning import STATISTICS, STATISTICS_KEY, autotuned, prune_statistics


@triton.jit
def _tap_reads(position, tap, OUT, STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr):
    """Whether ``tap`` of some output position reads input ``position``."""
    shifted = position + PAD - tap * DILATION
    return (shifted >= 0) & (shifted % STRIDE == 0) & (shifted // STRIDE < OUT)


@triton.jit
def _window_share(position, SIZE, OUT, STRIDE: tl.constexpr, CENTRE: tl.constexpr):
    """1 / (valid positions of the pooling window that holds ``position``), 0 where none does."""
    shifted = position - CENTRE
    index = tl.maximum(shifted, 0) // STRIDE
    count = window_overlap(index * STRIDE + CENTRE, SIZE, STRIDE)
    held = (shifted >= 0) & (index < OUT) & (count > 0)
    return tl.where(held, 1.0 / tl.maximum(count, 1).to(tl.float32), 0.0)


@triton.jit
def _edge_pixel(index, H, W, top, bottom, left, right):
    """Row and column of pixel ``index`` of those outside rows [top, bottom) x columns [left, right): first the rows
    above and below, then what is left of those between."""
    outer_rows = top + H - bottom
    outer_columns = tl.maximum(left + W - right, 1)  # there may be none
    row = index // W
    row = tl.where(row < top, row, row - top + bottom)
    column = index % W
    between = index - outer_rows * W
    side = between % outer_columns
    row = tl.where(between < 0, row, top + between // outer_columns)
    column = tl.where(between < 0, column, tl.where(side < left, side, side - left + right))
    return row, column


@autotuned(STATISTICS, STATISTICS_KEY, prune_statistics)
@triton.jit(do_not_specialize=["N", "H", "W", "HO", "WO"])
def window_statistics(
    x_ptr,  # [N, H, W, C], pixels x_stride apart
    partial_ptr,  # [SPLITS, N, ROWS, C] float32
    N,
    H,
    W,
    HO,
    WO,
    x_stride,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ROWS: tl.constexpr,  # KH KW taps; at a stride two more, the high and the low part of pool
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PIX: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (channel blocks x N, splits of the pixels, row blocks), channels fastest."""
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    TAPS: tl.constexpr = KH * KW
    DENSE: tl.constexpr = STRIDE_H * STRIDE_W == 1
    c = tl.program_id(0) % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    sample = tl.program_id(0) // C_BLOCKS
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    c_mask = c < C
    t = tl.arange(0, BLOCK_ROWS)[:, None]
    if ROWS > BLOCK_ROWS:
        t += tl.program_id(2) * BLOCK_ROWS
    acc = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    weighed = H * W  # pixels whose weights are computed
    if DENSE:
        # All taps read rows [top, bottom), columns [left, right).
        top = tl.minimum(max(DILATION_H * (KH - 1) - PAD_H, 0), H)
        left = tl.minimum(max(DILATION_W * (KW - 1) - PAD_W, 0), W)
        bottom = tl.maximum(tl.minimum(HO - PAD_H, H), top)
        right = tl.maximum(tl.minimum(WO - PAD_W, W), left)
        edges = H * W - (bottom - top) * (right - left)
        # Small maps are nearly all edge, or a step or two either way.
        totals = (2 * edges <= H * W) & (H * W > 2 * BLOCK_PIX)
        weighed = tl.where(totals, edges, weighed)
        ones = tl.full((BLOCK_ROWS, BLOCK_PIX), 1.0, tl.float32).to(x_ptr.dtype.element_ty)
        per_split = tl.cdiv(tl.where(totals, H * W, 0), splits)
        end = tl.minimum((split + 1) * per_split, H * W)
        for pixel0 in range(split * per_split, end, BLOCK_PIX):
            pixel = pixel0 + tl.arange(0, BLOCK_PIX)
            pointers = x_ptr + (sample.to(tl.int64) * H * W + pixel) * x_stride
            x = tl.load(pointers[:, None] + c[None, :], mask=(pixel < end)[:, None] & c_mask[None, :], other=0.0)
            acc = dot(ones, x, acc, "ieee")
    per_split = tl.cdiv(weighed, splits)
    end = tl.minimum((split + 1) * per_split, weighed)
    for pixel0 in range(split * per_split, end, BLOCK_PIX):
        index = pixel0 + tl.arange(0, BLOCK_PIX)
        in_range = index < end
        row = index // W
        column = index % W
        if DENSE:
            if totals:
                row, column = _edge_pixel(index, H, W, top, bottom, left, right)
        pointers = pixel_pointers(x_ptr, sample, row, column, H, W, x_stride)
        x = tl.load(pointers[:, None] + c[None, :], mask=in_range[:, None] & c_mask[None, :], other=0.0)
        reads = _tap_reads(row[None, :], t // KW, HO, STRIDE_H, PAD_H, DILATION_H)
        reads &= _tap_reads(column[None, :], t % KW, WO, STRIDE_W, PAD_W, DILATION_W)
        weight = tl.where(reads & (t < TAPS), 1.0, 0.0)
        if DENSE:
            weight -= tl.where(totals, 1.0, 0.0)
        if ROWS > TAPS:
            share = _window_share(row, H, HO, STRIDE_H, DILATION_H * (KH - 1) // 2 - PAD_H)
            share *= _window_share(column, W, WO, STRIDE_W, DILATION_W * (KW - 1) // 2 - PAD_W)
            high = share.to(x_ptr.dtype.element_ty).to(tl.float32)
            weight = tl.where(t == TAPS, high[None, :], weight)
            weight = tl.where(t == TAPS + 1, (share - high)[None, :], weight)
        acc = dot(weight.to(x_ptr.dtype.element_ty), x, acc, "ieee")
    out = partial_ptr + ((split * N + sample).to(tl.int64) * ROWS + t) * C + c[None, :]
    tl.store(out, acc, mask=(t < ROWS) & c_mask[None, :])
