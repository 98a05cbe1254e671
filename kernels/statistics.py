"""Sums of x over the pixels that each tap reads, from one read of x.

    win[n, tap, c] = sum_{p in output} x[n, p at tap, c]          (pixels outside the image count as 0)
    pool[n, c]     = sum_{p in output} pool(x)[n, p, c]           (at stride 1 this is the centre tap's win)

Both are sums over pixels with weights that do not depend on n or c, and each is one for the pixel's row times one for
its column. So a row of an image contributes one small matrix product, [taps, columns] weights, the same for every row,
times [columns, channels] of x; what that makes for a tap is added if the tap reads the row. That holds for any kernel
size, stride, padding and dilation. The weights of win are 0 or 1. Those of pool are 1 / (valid columns of the window),
which half precision may not hold, so they are split into a high and a low part, a line each.

With PACK further programs of the same launch write the weights as the one matrix that the descriptor kernel reads
(:mod:`.packing` says which and why here).
"""

import triton
import triton.language as tl

from .overlap import let_next_begin, wait_for_previous
from .packing import pack_weights
from .tiles import dot, window_overlap


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
def _window_sums(
    x_ptr,
    partial_ptr,
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
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A block of the sums; arguments as for the kernel below."""
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    TAPS: tl.constexpr = KH * KW
    c = tl.program_id(0) % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    sample = tl.program_id(0) // C_BLOCKS
    split = tl.program_id(1)
    c_mask = c < C
    t = tl.arange(0, BLOCK_ROWS)[:, None]
    if ROWS > BLOCK_ROWS:
        t += tl.program_id(2) * BLOCK_ROWS
    per_split = tl.cdiv(H, tl.num_programs(1))
    first, last = split * per_split, tl.minimum((split + 1) * per_split, H)

    acc = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for column0 in range(0, W, BLOCK_W):
        column = column0 + tl.arange(0, BLOCK_W)
        across = _tap_reads(column[None, :], t % KW, WO, STRIDE_W, PAD_W, DILATION_W)
        across = tl.where(across & (t < TAPS), 1.0, 0.0)
        if ROWS > TAPS:
            share = _window_share(column, W, WO, STRIDE_W, DILATION_W * (KW - 1) // 2 - PAD_W)
            high = share.to(x_ptr.dtype.element_ty).to(tl.float32)
            across = tl.where(t == TAPS, high[None, :], across)
            across = tl.where(t == TAPS + 1, (share - high)[None, :], across)
        across = across.to(x_ptr.dtype.element_ty)
        pixels = x_ptr + (sample.to(tl.int64) * H * W + column) * x_stride
        mask = (column < W)[:, None] & c_mask[None, :]
        for row in tl.range(first, last, num_stages=4):
            x = tl.load((pixels + tl.cast(row * W, tl.int64) * x_stride)[:, None] + c[None, :], mask=mask, other=0.0)
            sums = dot(across, x, tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32), "ieee")
            down = tl.where(_tap_reads(row, t // KW, HO, STRIDE_H, PAD_H, DILATION_H), 1.0, 0.0)
            if ROWS > TAPS:
                share_of_row = _window_share(row, H, HO, STRIDE_H, DILATION_H * (KH - 1) // 2 - PAD_H)
                down = tl.where(t < TAPS, down, share_of_row)
            acc += down * sums
    out = partial_ptr + ((split * N + sample).to(tl.int64) * ROWS + t) * C + c[None, :]
    tl.store(out, acc, mask=(t < ROWS) & c_mask[None, :])


@triton.jit(do_not_specialize=["N", "H", "W", "HO", "WO"])
def window_statistics(
    x_ptr,  # [N, H, W, C], pixels x_stride apart
    partial_ptr,  # [SPLITS, N, ROWS, C] float32
    gwc_ptr,  # [CO, KH, KW, CR / G]; this and the next two are read, and the one after them written, only if PACK
    pwc_ptr,  # [CO, CR]
    redundant_ptr,  # [CO, C - CR]
    packed_ptr,  # see packing
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
    PACK: tl.constexpr,
    CR: tl.constexpr,  # this and the next three are read only if PACK
    CO: tl.constexpr,
    G: tl.constexpr,
    MERGE: tl.constexpr,  # groups merged into one
    OVERLAP: tl.constexpr,  # see overlap
    BLOCK_ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,  # columns of a step, in one row
    BLOCK_C: tl.constexpr,
):
    """Grid: (channel blocks x N + blocks of packed weights / splits, splits of the rows, row blocks), channels
    fastest, the packing programs last."""
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    wait_for_previous(OVERLAP)
    let_next_begin(OVERLAP)
    if PACK and tl.program_id(0) >= C_BLOCKS * N:
        program = (tl.program_id(0) - C_BLOCKS * N) * tl.num_programs(1) + tl.program_id(1)
        pack_weights(program, gwc_ptr, pwc_ptr, redundant_ptr, packed_ptr, C, CR, CO, G, MERGE, STRIDE_H)
    else:
        _window_sums(
            x_ptr, partial_ptr, N, H, W, HO, WO, x_stride, C, KH, KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W,
            DILATION_H, DILATION_W, ROWS, BLOCK_ROWS, BLOCK_W, BLOCK_C,
        )  # fmt: skip
