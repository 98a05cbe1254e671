"""What the point-wise convolutions read at a stride: x averaged over the valid pixels of each window.

The forward averages as it goes. The weight gradient would load and average every window once for each block of output
channels, in the middle of its loop; from this map, a stride-th of x each way, it loads a pixel.
"""

import triton
import triton.language as tl

from .tiles import decode_pixels, load_pooled, pixel_pointers


@triton.jit(do_not_specialize=["pixels", "H", "W", "HO", "WO"])
def pool_windows(
    x_ptr,  # [N, H, W, C], pixels x_stride apart
    pooled_ptr,  # [N, HO, WO, C]
    pixels,  # N HO WO
    H,
    W,
    HO,
    WO,
    x_stride,
    C: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    CENTRE_H: tl.constexpr,  # the first window's first row; it may lie outside
    CENTRE_W: tl.constexpr,
    BLOCK_PIX: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (channel blocks x pixel blocks,), channels fastest."""
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    channel = tl.program_id(0) % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = tl.program_id(0) // C_BLOCKS * BLOCK_PIX + tl.arange(0, BLOCK_PIX)
    c_mask = channel < C
    in_range = pixel < pixels
    sample, out_row, out_column = decode_pixels(pixel, HO, WO)
    row = out_row * STRIDE_H + CENTRE_H
    column = out_column * STRIDE_W + CENTRE_W
    pointers = pixel_pointers(x_ptr, sample, row, column, H, W, x_stride)
    pooled = load_pooled(pointers, row, column, in_range, channel, c_mask, H, W, x_stride, STRIDE_H, STRIDE_W)
    out = pooled_ptr + pixel.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(out, pooled, mask=in_range[:, None] & c_mask[None, :])
