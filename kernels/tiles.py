"""Where a block of pixels lies, which taps of it are inside the image, and how it is loaded."""

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in float32.

    Without tensor cores a sum is one addition after another, and its error grows with their number: what a step adds
    is summed by itself first. Triton merges a product and a sum; the two casts, no instructions, keep them apart.

    Triton's interpreter (3.6 to 3.9) multiplies the bit patterns of bfloat16 operands as integers, hence the detour.
    """
    if INTERPRETED:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    elif PRECISION == "ieee" and a.dtype == tl.float32:
        part = tl.dot(a, b, input_precision=PRECISION)
        acc += part.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dot_computed(a, b, acc, PRECISION: tl.constexpr, HOPPER: tl.constexpr):
    """:func:`dot` of operands that are computed, not loaded, in a loop.

    A Hopper's warp group multiplies such an ``a`` out of registers while the program goes on, and Triton (3.6 to 3.8)
    lets the next step compute into them before they have been read: results are wrong now and then. Whatever reads acc
    has to wait for the product first, and so does this, which is no instruction.
    """
    acc = dot(a, b, acc, PRECISION)
    if HOPPER:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def dot_float32(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b of a float32 a, about as exact as float32 is; on tensor cores, unless PRECISION is ``"ieee"``.

    Beside a b of half precision a goes in as two numbers like it, which hold 22 of its 24 bits, or 16 in bfloat16: a
    good deal more than b does. A float32 b goes in as PRECISION says, ``"tf32x3"`` for two TF32 numbers each.
    """
    if INTERPRETED:
        acc = tl.dot(a, b.to(tl.float32), acc)
    elif b.dtype == tl.float32:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        high = a.to(b.dtype)
        acc = tl.dot(high, b, acc)
        acc = tl.dot((a - high.to(tl.float32)).to(b.dtype), b, acc)
    return acc


@triton.jit
def dot_any_range(a, b, acc):
    """As :func:`dot_float32`, of an a that may be too small or too large for a half-precision b, on NVIDIA's GPUs.

    TF32 has float32's range, and holds whatever such a b is cast from.
    """
    if INTERPRETED:
        acc = tl.dot(a, b.to(tl.float32), acc)
    else:
        high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # the 13 bits that TF32 lacks are 0
        acc = tl.dot(high, b.to(tl.float32), acc, input_precision="tf32")
        acc = tl.dot(a - high, b.to(tl.float32), acc, input_precision="tf32")
    return acc


@triton.jit
def decode_pixels(index, HEIGHT, WIDTH):
    """Flat pixel numbers of [N, HEIGHT, WIDTH] as (sample, row, column)."""
    column = index % WIDTH
    line = index // WIDTH
    return line // HEIGHT, line % HEIGHT, column


@triton.jit
def inside(row, column, HEIGHT, WIDTH):
    """Which (row, column) pairs are pixels of the image."""
    return (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)


@triton.jit
def pixel_pointers(base_ptr, sample, row, column, HEIGHT, WIDTH, pixel_stride):
    """Pointer to channel 0 of each pixel, in 64 bits: a tensor may hold more than 2^31 elements."""
    return base_ptr + ((sample * HEIGHT + row) * WIDTH + column).to(tl.int64) * pixel_stride


@triton.jit
def window_overlap(start, SIZE, STRIDE: tl.constexpr):
    """How many of the STRIDE positions from ``start`` on lie in [0, SIZE)."""
    return tl.maximum(tl.minimum(start + STRIDE, SIZE) - tl.maximum(start, 0), 0)


@triton.jit
def load_pooled(
    pointers,  # [BLOCK_PIX], to channel 0 of the window's first pixel
    row,
    column,  # [BLOCK_PIX], the window's first pixel; it may lie outside
    in_range,  # [BLOCK_PIX]
    channel,  # [BLOCK_C]
    channel_mask,  # [BLOCK_C]
    HEIGHT,
    WIDTH,
    pixel_stride,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
):
    """Average over the valid pixels of each STRIDE_H x STRIDE_W window, 0 for a window wholly outside.

    Returns [BLOCK_PIX, BLOCK_C] in the pointers' dtype; the sum is in float32.
    """
    tile = pointers[:, None] + channel[None, :]
    if STRIDE_H * STRIDE_W == 1:
        mask = (in_range & inside(row, column, HEIGHT, WIDTH))[:, None] & channel_mask[None, :]
        pooled = tl.load(tile, mask=mask, other=0.0)
    else:
        total = tl.zeros(tile.shape, tl.float32)
        for dy in tl.static_range(STRIDE_H):
            for dx in tl.static_range(STRIDE_W):
                valid = in_range & inside(row + dy, column + dx, HEIGHT, WIDTH)
                mask = valid[:, None] & channel_mask[None, :]
                offset = tl.cast(dy * WIDTH + dx, tl.int64) * pixel_stride
                total += tl.load(tile + offset, mask=mask, other=0.0).to(tl.float32)
        count = window_overlap(row, HEIGHT, STRIDE_H) * window_overlap(column, WIDTH, STRIDE_W)
        pooled = (total * (1.0 / tl.maximum(count, 1).to(tl.float32))[:, None]).to(pointers.dtype.element_ty)
    return pooled


@triton.jit
def tap_box(
    x_desc,
    first_sample,
    first_row,
    first_column,
    tap_row,
    tap_column,
    channel,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_PIX: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What a tap of a 3 x 3 window reads for a tile of output pixels, [BLOCK_PIX, BLOCK_K]; zero outside the image.

    At stride 2, for even H and W, that is of x as [N, H / 2, 2, W / 2, 2 C], where every tap is a moved box too.
    """
    if STRIDE == 1:
        box = x_desc.load([first_sample, first_row + tap_row - 1, first_column + tap_column - 1, channel])
    else:
        # Input row 2 i + tap - 1: the odd row before for tap 0, else row tap - 1 of pair i. Columns likewise.
        row = first_row - (tap_row == 0).to(tl.int32)
        column = first_column - (tap_column == 0).to(tl.int32)
        odd_row = (tap_row != 1).to(tl.int32)
        odd_column = (tap_column != 1).to(tl.int32)
        box = x_desc.load([first_sample, row, odd_row, column, odd_column * C + channel])
    return box.reshape(BLOCK_PIX, BLOCK_K)
