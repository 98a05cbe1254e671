"""GAP / softmax fusion: Y = beta U3 + gamma U1, beta = sigmoid(d), gamma = sigmoid(-d), d = GAP(U3) - GAP(U1).

Backward, with g = dL/dY and P pixels:

    A     = sum_p g (U3 - U1)             = dL/dbeta
    delta = beta gamma A                  = dL/dd
    dU3   = beta g + delta / P
    dU1   = gamma g - delta / P

Both directions are two launches: partial sums over slices of the pixels, then a blend whose programs add the partials
in fixed order. There are no atomics, so the same input gives the same bits.
"""

import triton
import triton.language as tl

from .tuning import FUSION, FUSION_GRAD, FUSION_KEY, autotuned, prune_channels


@triton.jit
def sigmoid(d):
    """Logistic function in float32, by the exponential that cannot overflow."""
    e = tl.exp(-tl.abs(d))
    return tl.where(d >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _sum_partials(partial_ptr, offset, mask, N, C: tl.constexpr, SPLITS: tl.constexpr):
    """Sum over the first axis of [SPLITS, N, C] at ``offset`` into [N, C], in fixed order."""
    total = tl.load(partial_ptr + offset, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial_ptr + split * N * C + offset, mask=mask, other=0.0)
    return total


@autotuned(FUSION, FUSION_KEY, prune_channels)
@triton.jit(do_not_specialize=["N", "P", "pixels_per_split"])
def fusion_statistics(
    u3_ptr,  # [N, P, C]
    u1_ptr,  # [N, P, C]
    grad_ptr,  # [N, P, C]; read only if WEIGHTED
    partial_ptr,  # [SPLITS, N, C] float32
    N,
    P,
    pixels_per_split,
    C: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_PIX: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of (U3 - U1), or of g (U3 - U1), over a slice of the pixels. Grid: (channel blocks x N, splits)."""
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = tl.program_id(0) % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    sample = tl.program_id(0) // C_BLOCKS
    split = tl.program_id(1)
    c_mask = c < C
    start = split * pixels_per_split
    end = tl.minimum(start + pixels_per_split, P)
    base = sample.to(tl.int64) * P * C + c[None, :]
    acc = tl.zeros((BLOCK_PIX, BLOCK_C), tl.float32)
    for pixel0 in range(start, end, BLOCK_PIX):
        pixel = pixel0 + tl.arange(0, BLOCK_PIX)
        mask = (pixel < end)[:, None] & c_mask[None, :]
        offset = base + pixel.to(tl.int64)[:, None] * C
        u3 = tl.load(u3_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        u1 = tl.load(u1_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        difference = u3 - u1
        if WEIGHTED:
            difference *= tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        acc += difference
    tl.store(partial_ptr + (split * N + sample) * C + c, tl.sum(acc, 0), mask=c_mask)


@triton.jit
def decode_blend(P, C: tl.constexpr, BLOCK_PIX: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels [BLOCK_C], sample and pixel block of a program. Grid: (channel blocks x pixel blocks x N,)."""
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    pixel_blocks = tl.cdiv(P, BLOCK_PIX)
    c = pid % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, pid // (C_BLOCKS * pixel_blocks), pid // C_BLOCKS % pixel_blocks


@autotuned(FUSION, FUSION_KEY, prune_channels)
@triton.jit(do_not_specialize=["N", "P"])
def fusion_blend(
    u3_ptr,  # [N, P, C]
    u1_ptr,  # [N, P, C]
    partial_ptr,  # [SPLITS, N, C] float32, sums of U3 - U1
    y_ptr,  # [N, P, C]
    gate_ptr,  # [N, C] float32, d
    N,
    P,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_PIX: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: as :func:`decode_blend`. The programs of pixel block 0 also store d."""
    c, sample, pixel_block = decode_blend(P, C, BLOCK_PIX, BLOCK_C)
    pixel = pixel_block * BLOCK_PIX + tl.arange(0, BLOCK_PIX)
    c_mask = c < C
    d = _sum_partials(partial_ptr, sample * C + c, c_mask, N, C, SPLITS) / tl.cast(P, tl.float32)
    d += d - d  # NaN where a mean is infinite, as the softmax over it is
    if pixel_block == 0:
        tl.store(gate_ptr + sample * C + c, d, mask=c_mask)
    mask = (pixel < P)[:, None] & c_mask[None, :]
    offset = (sample.to(tl.int64) * P + pixel)[:, None] * C + c[None, :]
    u3 = tl.load(u3_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    u1 = tl.load(u1_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    y = sigmoid(d)[None, :] * u3 + sigmoid(-d)[None, :] * u1
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@autotuned(FUSION_GRAD, FUSION_KEY, prune_channels)
@triton.jit(do_not_specialize=["N", "P"])
def fusion_blend_grad(
    grad_ptr,  # [N, P, C]
    partial_ptr,  # [SPLITS, N, C] float32, sums of g (U3 - U1)
    gate_ptr,  # [N, C] float32, d
    du3_ptr,  # [N, P, C]
    du1_ptr,  # [N, P, C]
    N,
    P,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_PIX: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: as :func:`decode_blend`."""
    c, sample, pixel_block = decode_blend(P, C, BLOCK_PIX, BLOCK_C)
    pixel = pixel_block * BLOCK_PIX + tl.arange(0, BLOCK_PIX)
    c_mask = c < C
    d = tl.load(gate_ptr + sample * C + c, mask=c_mask, other=0.0)
    beta = sigmoid(d)
    gamma = sigmoid(-d)
    inner = _sum_partials(partial_ptr, sample * C + c, c_mask, N, C, SPLITS)
    constant = (beta * gamma * inner / tl.cast(P, tl.float32))[None, :]
    mask = (pixel < P)[:, None] & c_mask[None, :]
    offset = (sample.to(tl.int64) * P + pixel)[:, None] * C + c[None, :]
    grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(du3_ptr + offset, (beta[None, :] * grad + constant).to(du3_ptr.dtype.element_ty), mask=mask)
    tl.store(du1_ptr + offset, (gamma[None, :] * grad - constant).to(du1_ptr.dtype.element_ty), mask=mask)
