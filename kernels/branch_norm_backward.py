"""Gradients of the layer with a batch norm in each branch, down to dL/dU3 and dL/dU1.

Notation of :mod:`.branch_norm`; g = dL/dY, K = N P values per channel, u = r (U - mu), and per (sample, channel)

    B = sum_p g,   T3 = sum_p g (U3 - mu3),   T1 = sum_p g (U1 - mu1),   R3 = sum_p (U3 - mu3),   R1 = sum_p (U1 - mu1)

The gate. dL/dbeta = sum_p g (V3 - V1) with V = w r (U - mu) + b, so

    delta = beta gamma (w3 r3 T3 - w1 r1 T1 + (b3 - b1) B)                                 = dL/dd
    dL/dV3 = beta g + delta / P,                    dL/dV1 = gamma g - delta / P

The norms' parameters, sums of these over all pixels, with u for the weights:

    db3 = sum_n (beta B + delta),                   db1 = sum_n (gamma B - delta),         dbias = sum_n B
    dw3 = r3 sum_n (beta T3 + delta R3 / P),        dw1 = r1 sum_n (gamma T1 - delta R1 / P)

and through the norms, whose mean and variance depend on every pixel,

    dL/dU3 = w3 r3 (dL/dV3 - db3 / K - u3 dw3 / K)
           = grad3 g + slope3 (U3 - mu3) + constant3,
    grad3 = w3 r3 beta,   slope3 = -w3 r3^2 dw3 / K,   constant3 = w3 r3 (delta / P - db3 / K)

and so for U1 with gamma and -delta. U - mu, not U, so that nothing of the size of the mean cancels; and as mu is
rounded to float32, rho = sum_n R / K, what that left of the mean, is taken off as well: dw3 - r3 rho3 db3, and
constant3 - slope3 rho3. Else the gradients of the weights, sums of dL/dU times an x that may have a large mean too,
would show that dL/dU does not quite add up to 0.

Three launches: the sums over slices of the pixels, the coefficients, and one pass that writes both gradients side by
side as U is. From there on they are the gradients of the convolutions, in :mod:`.backward`. There are no atomics.
"""

import triton
import triton.language as tl

from .fusion import decode_blend, sigmoid
from .tuning import FUSION, FUSION_KEY, NORM_SUMS, autotuned, prune_channels


@autotuned(NORM_SUMS, FUSION_KEY, prune_channels)
@triton.jit(do_not_specialize=["N", "P", "pixels_per_split"])
def norm_sums(
    grad_ptr,  # [N, P, C]
    u_ptr,  # [N, P, 2 C]
    batch_ptr,  # mean first [3, 2 C] float32
    partial_ptr,  # parts of B, T3, T1, R3, R1 [SPLITS, 5, N, C] float32
    N,
    P,
    pixels_per_split,
    C: tl.constexpr,
    BLOCK_PIX: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The five sums over a slice of the pixels. Grid: (channel blocks x N, splits), channels fastest."""
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = tl.program_id(0) % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    sample = tl.program_id(0) // C_BLOCKS
    split = tl.program_id(1)
    c_mask = c < C
    mean3 = tl.load(batch_ptr + c, mask=c_mask, other=0.0)
    mean1 = tl.load(batch_ptr + C + c, mask=c_mask, other=0.0)
    start = split * pixels_per_split
    end = tl.minimum(start + pixels_per_split, P)
    b = tl.zeros((BLOCK_PIX, BLOCK_C), tl.float32)
    t3 = tl.zeros((BLOCK_PIX, BLOCK_C), tl.float32)
    t1 = tl.zeros((BLOCK_PIX, BLOCK_C), tl.float32)
    r3 = tl.zeros((BLOCK_PIX, BLOCK_C), tl.float32)
    r1 = tl.zeros((BLOCK_PIX, BLOCK_C), tl.float32)
    for pixel0 in range(start, end, BLOCK_PIX):
        pixel = pixel0 + tl.arange(0, BLOCK_PIX)
        mask = (pixel < end)[:, None] & c_mask[None, :]
        row = (sample.to(tl.int64) * P + pixel)[:, None]
        g = tl.load(grad_ptr + row * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        u3 = tl.load(u_ptr + row * (2 * C) + c[None, :], mask=mask, other=0.0).to(tl.float32)
        u1 = tl.load(u_ptr + row * (2 * C) + (C + c)[None, :], mask=mask, other=0.0).to(tl.float32)
        u3 = tl.where(mask, u3 - mean3[None, :], 0.0)
        u1 = tl.where(mask, u1 - mean1[None, :], 0.0)
        b += g
        t3 += g * u3
        t1 += g * u1
        r3 += u3
        r1 += u1
    plane = tl.cast(N, tl.int64) * C
    out = partial_ptr + split * 5 * plane + sample.to(tl.int64) * C + c
    tl.store(out, tl.sum(b, 0), mask=c_mask)
    tl.store(out + plane, tl.sum(t3, 0), mask=c_mask)
    tl.store(out + 2 * plane, tl.sum(t1, 0), mask=c_mask)
    tl.store(out + 3 * plane, tl.sum(r3, 0), mask=c_mask)
    tl.store(out + 4 * plane, tl.sum(r1, 0), mask=c_mask)


@triton.jit
def _sum_of_splits(partial_ptr, offset, mask, stride, SPLITS):
    """Sum over the first axis of partials, ``stride`` apart, in fixed order: [BLOCK_N, BLOCK_C]."""
    total = tl.zeros(mask.shape, tl.float32)
    for split in range(0, SPLITS):
        total += tl.load(partial_ptr + split * stride + offset, mask=mask, other=0.0)
    return total


@triton.jit
def _delta(b, t3, t1, beta, gamma, gain3, gain1, bias_difference):
    return beta * gamma * (gain3[None, :] * t3 - gain1[None, :] * t1 + bias_difference[None, :] * b)


@triton.jit(do_not_specialize=["N", "P", "SPLITS"])
def norm_coefficients(
    partial_ptr,  # parts of B, T3, T1, R3, R1 [SPLITS, 5, N, C] float32
    batch_ptr,  # mean, variance, r [3, 2 C] float32
    gate_ptr,  # d [N, C] float32
    weight3_ptr,  # [C]
    bias3_ptr,  # [C]
    weight1_ptr,  # [C]
    bias1_ptr,  # [C]
    planes_ptr,  # grad3, constant3, grad1, constant1 [4, N, C] float32
    slope_ptr,  # slope3, slope1 [2, C] float32
    d_norm_ptr,  # dw3, db3, dw1, db1, dbias [5, C] float32
    N,
    P,
    SPLITS,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (channel blocks,)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    samples = tl.arange(0, BLOCK_N)
    plane = tl.cast(N, tl.int64) * C
    size = tl.cast(P, tl.float32)
    values = tl.cast(N, tl.float32) * size
    r3 = tl.load(batch_ptr + 4 * C + c, mask=c_mask, other=0.0)
    r1 = tl.load(batch_ptr + 5 * C + c, mask=c_mask, other=0.0)
    gain3 = tl.load(weight3_ptr + c, mask=c_mask, other=0.0).to(tl.float32) * r3
    gain1 = tl.load(weight1_ptr + c, mask=c_mask, other=0.0).to(tl.float32) * r1
    bias_difference = tl.load(bias3_ptr + c, mask=c_mask, other=0.0).to(tl.float32)
    bias_difference -= tl.load(bias1_ptr + c, mask=c_mask, other=0.0).to(tl.float32)

    dw3 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    db3 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dw1 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    db1 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    rest3 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    rest1 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + samples
        mask = (n < N)[:, None] & c_mask[None, :]
        offset = n[:, None] * C + c[None, :]
        b = _sum_of_splits(partial_ptr, offset, mask, 5 * plane, SPLITS)
        t3 = _sum_of_splits(partial_ptr + plane, offset, mask, 5 * plane, SPLITS)
        t1 = _sum_of_splits(partial_ptr + 2 * plane, offset, mask, 5 * plane, SPLITS)
        sum3 = _sum_of_splits(partial_ptr + 3 * plane, offset, mask, 5 * plane, SPLITS)
        sum1 = _sum_of_splits(partial_ptr + 4 * plane, offset, mask, 5 * plane, SPLITS)
        d = tl.load(gate_ptr + offset, mask=mask, other=0.0)
        beta = sigmoid(d)
        gamma = sigmoid(-d)
        delta = _delta(b, t3, t1, beta, gamma, gain3, gain1, bias_difference)
        dw3 += beta * t3 + delta * (sum3 / size)
        dw1 += gamma * t1 - delta * (sum1 / size)
        db3 += beta * b + delta
        db1 += gamma * b - delta
        dbias += b
        rest3 += sum3
        rest1 += sum1
    rho3 = tl.sum(rest3, 0) / values
    rho1 = tl.sum(rest1, 0) / values
    total_db3 = tl.sum(db3, 0)
    total_db1 = tl.sum(db1, 0)
    total_dw3 = r3 * (tl.sum(dw3, 0) - rho3 * total_db3)
    total_dw1 = r1 * (tl.sum(dw1, 0) - rho1 * total_db1)
    out = d_norm_ptr + c
    tl.store(out, total_dw3, mask=c_mask)
    tl.store(out + C, total_db3, mask=c_mask)
    tl.store(out + 2 * C, total_dw1, mask=c_mask)
    tl.store(out + 3 * C, total_db1, mask=c_mask)
    tl.store(out + 4 * C, tl.sum(dbias, 0), mask=c_mask)

    slope3 = -gain3 * r3 * total_dw3 / values
    slope1 = -gain1 * r1 * total_dw1 / values
    tl.store(slope_ptr + c, slope3, mask=c_mask)
    tl.store(slope_ptr + C + c, slope1, mask=c_mask)
    common3 = gain3 * total_db3 / values + slope3 * rho3
    common1 = gain1 * total_db1 / values + slope1 * rho1
    for n0 in range(0, N, BLOCK_N):
        n = n0 + samples
        mask = (n < N)[:, None] & c_mask[None, :]
        offset = n[:, None] * C + c[None, :]
        b = _sum_of_splits(partial_ptr, offset, mask, 5 * plane, SPLITS)
        t3 = _sum_of_splits(partial_ptr + plane, offset, mask, 5 * plane, SPLITS)
        t1 = _sum_of_splits(partial_ptr + 2 * plane, offset, mask, 5 * plane, SPLITS)
        d = tl.load(gate_ptr + offset, mask=mask, other=0.0)
        beta = sigmoid(d)
        gamma = sigmoid(-d)
        shift = _delta(b, t3, t1, beta, gamma, gain3, gain1, bias_difference) / size
        tl.store(planes_ptr + offset, gain3[None, :] * beta, mask=mask)
        tl.store(planes_ptr + plane + offset, gain3[None, :] * shift - common3[None, :], mask=mask)
        tl.store(planes_ptr + 2 * plane + offset, gain1[None, :] * gamma, mask=mask)
        tl.store(planes_ptr + 3 * plane + offset, -gain1[None, :] * shift - common1[None, :], mask=mask)


@autotuned(FUSION, FUSION_KEY, prune_channels)
@triton.jit(do_not_specialize=["N", "P"])
def norm_blend_grad(
    grad_ptr,  # [N, P, C]
    u_ptr,  # [N, P, 2 C]
    batch_ptr,  # mean first [3, 2 C] float32
    planes_ptr,  # grad3, constant3, grad1, constant1 [4, N, C] float32
    slope_ptr,  # slope3, slope1 [2, C] float32
    du_ptr,  # [N, P, 2 C]
    N,
    P,
    C: tl.constexpr,
    BLOCK_PIX: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (channel blocks x pixel blocks of a sample x N,), channels fastest."""
    c, sample, pixel_block = decode_blend(P, C, BLOCK_PIX, BLOCK_C)
    pixel = pixel_block * BLOCK_PIX + tl.arange(0, BLOCK_PIX)
    c_mask = c < C
    mask = (pixel < P)[:, None] & c_mask[None, :]
    row = (sample.to(tl.int64) * P + pixel)[:, None]
    grad = tl.load(grad_ptr + row * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    plane = tl.cast(N, tl.int64) * C
    planes = planes_ptr + sample.to(tl.int64) * C + c
    for branch in tl.static_range(2):
        mean = tl.load(batch_ptr + branch * C + c, mask=c_mask, other=0.0)
        slope = tl.load(slope_ptr + branch * C + c, mask=c_mask, other=0.0)
        factor = tl.load(planes + 2 * branch * plane, mask=c_mask, other=0.0)
        constant = tl.load(planes + (2 * branch + 1) * plane, mask=c_mask, other=0.0)
        offset = row * (2 * C) + (branch * C + c)[None, :]
        u = tl.load(u_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        du = factor[None, :] * grad + slope[None, :] * (u - mean[None, :]) + constant[None, :]
        tl.store(du_ptr + offset, du.to(du_ptr.dtype.element_ty), mask=mask)
