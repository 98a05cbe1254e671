"""Mean and sum of squared deviations of each channel, by blocks of pixels, and their combination.

A block's deviations are taken from the block's own mean, so that nothing cancels where the mean is large. Blocks with
counts c_i, means m_i and sums M_i combine, by Chan, Golub and LeVeque (1979), to

    m = sum_i c_i m_i / c,    M = sum_i (M_i + c_i (m_i - m)^2),    c = sum_i c_i,

here in fixed order, so the same input gives the same bits.

A block of BLOCK_PIX pixels of a batch may hold parts of several samples, and each part has moments of its own. From one
part to the next either the block changes or the sample, or both do, where a sample begins with a block: every PERIOD
samples, PERIOD = BLOCK_PIX / gcd(P, BLOCK_PIX). So the parts are numbered without a gap by block + sample - sample //
PERIOD.
"""

import triton
import triton.language as tl


@triton.jit
def _part_pixels(sample, block, P, BLOCK_PIX: tl.constexpr):
    """How many pixels of a sample lie in a block of the batch's pixels, at least 0."""
    start = tl.maximum(sample * P, block * BLOCK_PIX)
    end = tl.minimum((sample + 1) * P, (block + 1) * BLOCK_PIX)
    return tl.maximum(end - start, 0)


@triton.jit
def store_moments(
    value,  # [BLOCK_PIX, BLOCK_C] float32
    sample,  # [BLOCK_PIX]
    in_range,  # [BLOCK_PIX]
    block,
    channel,  # [BLOCK_C]
    channel_mask,  # [BLOCK_C]
    mean_ptr,  # [parts, C] float32
    square_ptr,  # [parts, C] float32
    pixels,  # N P
    P,
    PERIOD,
    C: tl.constexpr,
    BLOCK_PIX: tl.constexpr,
):
    """Means and sums of squared deviations of a block, of each sample in it."""
    first = block * BLOCK_PIX // P
    last = tl.minimum((block + 1) * BLOCK_PIX, pixels) - 1
    for n in range(first, last // P + 1):
        held = ((sample == n) & in_range)[:, None]
        count = _part_pixels(n, block, P, BLOCK_PIX).to(tl.float32)
        mean = tl.sum(tl.where(held, value, 0.0), 0) / count
        # The sum of large values is rounded; that of what they deviate by from it says by how much.
        deviation = tl.where(held, value - mean[None, :], 0.0)
        correction = tl.sum(deviation, 0) / count
        square = tl.sum(deviation * deviation, 0) - count * correction * correction
        offset = (block + n - n // PERIOD).to(tl.int64) * C + channel
        tl.store(mean_ptr + offset, mean + correction, mask=channel_mask)
        tl.store(square_ptr + offset, square, mask=channel_mask)


@triton.jit(do_not_specialize=["P", "PERIOD"])
def sample_moments(
    mean_ptr,  # of the parts [parts, C] float32
    square_ptr,  # [parts, C] float32
    sample_mean_ptr,  # [N, C] float32
    sample_square_ptr,  # [N, C] float32
    P,
    PERIOD,
    C: tl.constexpr,
    BLOCK_PIX: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Moments of the samples from those of their parts. Grid: (channel blocks x N,), channels fastest."""
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = tl.program_id(0) % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    sample = tl.program_id(0) // C_BLOCKS
    first = sample * P // BLOCK_PIX
    blocks = ((sample + 1) * P - 1) // BLOCK_PIX - first + 1
    base = (first + sample - sample // PERIOD).to(tl.int64) * C + c
    parts = tl.arange(0, BLOCK_PARTS)

    # Means are added as differences from the first, which are small where the mean is not.
    pivot = tl.load(mean_ptr + base, mask=c_mask, other=0.0)
    total = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float32)
    for part0 in range(0, blocks, BLOCK_PARTS):
        part = part0 + parts
        mask = (part < blocks)[:, None] & c_mask[None, :]
        count = _part_pixels(sample, first + part, P, BLOCK_PIX).to(tl.float32)
        mean = tl.load(mean_ptr + base[None, :] + part[:, None] * C, mask=mask, other=0.0)
        total += count[:, None] * tl.where(mask, mean - pivot[None, :], 0.0)
    sample_mean = pivot + tl.sum(total, 0) / tl.cast(P, tl.float32)

    total = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float32)
    for part0 in range(0, blocks, BLOCK_PARTS):
        part = part0 + parts
        mask = (part < blocks)[:, None] & c_mask[None, :]
        count = _part_pixels(sample, first + part, P, BLOCK_PIX).to(tl.float32)
        mean = tl.load(mean_ptr + base[None, :] + part[:, None] * C, mask=mask, other=0.0)
        square = tl.load(square_ptr + base[None, :] + part[:, None] * C, mask=mask, other=0.0)
        deviation = tl.where(mask, mean - sample_mean[None, :], 0.0)
        total += square + count[:, None] * deviation * deviation
    out = sample.to(tl.int64) * C + c
    tl.store(sample_mean_ptr + out, sample_mean, mask=c_mask)
    tl.store(sample_square_ptr + out, tl.sum(total, 0), mask=c_mask)


@triton.jit
def batch_moments(
    sample_mean_ptr,  # [N, C] float32
    sample_square_ptr,  # [N, C] float32
    c,  # [BLOCK_C]
    c_mask,  # [BLOCK_C]
    N,
    P,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and variance (by N P, not N P - 1) of channels over the batch, [BLOCK_C]."""
    samples = tl.arange(0, BLOCK_N)
    pivot = tl.load(sample_mean_ptr + c, mask=c_mask, other=0.0)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + samples
        mask = (n < N)[:, None] & c_mask[None, :]
        mean = tl.load(sample_mean_ptr + n[:, None] * C + c[None, :], mask=mask, other=0.0)
        total += tl.where(mask, mean - pivot[None, :], 0.0)
    batch_mean = pivot + tl.sum(total, 0) / tl.cast(N, tl.float32)

    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + samples
        mask = (n < N)[:, None] & c_mask[None, :]
        mean = tl.load(sample_mean_ptr + n[:, None] * C + c[None, :], mask=mask, other=0.0)
        square = tl.load(sample_square_ptr + n[:, None] * C + c[None, :], mask=mask, other=0.0)
        deviation = tl.where(mask, mean - batch_mean[None, :], 0.0)
        total += square + tl.cast(P, tl.float32) * deviation * deviation
    return batch_mean, tl.sum(total, 0) / (tl.cast(N, tl.float32) * tl.cast(P, tl.float32))
