"""The layer with a batch norm in each branch, normalising by the batch: U3 and U1 are in memory, once.

U3 and U1 lie beside each other, U [N, P, 2 C], the first C channels U3's. With mu, r = 1 / sqrt(variance + eps), w
and b each branch's own, per channel, and beta = sigmoid(d), gamma = sigmoid(-d) per (sample, channel):

    V3 = w3 r3 (U3 - mu3) + b3,    V1 = w1 r1 (U1 - mu1) + b1
    d  = mean_p V3 - mean_p V1
    Y  = beta V3 + gamma V1 + bias = scale3 (U3 - mu3) + scale1 (U1 - mu1) + offset

with scale3 = beta w3 r3, scale1 = gamma w1 r1, offset = beta b3 + gamma b1 + bias. Four launches: the convolutions,
which leave moments of what they store; moments of the samples; of the batch, and the planes; the blend. A sample's mean
after the norm is an affine map of its mean before it, so the GAP costs no read of U.
"""

import triton
import triton.language as tl

from .accumulate import add_pointwise, add_taps, output_block
from .fusion import decode_blend, sigmoid
from .moments import batch_moments, store_moments
from .tuning import BRANCHES, FUSION, FUSION_KEY, LAYER_KEY, autotuned, prune_branches, prune_channels


@autotuned(BRANCHES, LAYER_KEY, prune_branches)
@triton.jit(do_not_specialize=["pixels", "H", "W", "HO", "WO", "PERIOD"])
def branches_forward(
    x_ptr,  # [N, H, W, C], pixels x_stride apart
    gwc_ptr,  # [CO, KH, KW, CG]
    pwc_ptr,  # [CO, CR]
    redundant_ptr,  # [CO, C - CR]
    u_ptr,  # [N, HO, WO, 2 CO]
    mean_ptr,  # [parts, 2 CO] float32, as in moments
    square_ptr,  # [parts, 2 CO] float32
    pixels,  # N HO WO
    H,
    W,
    HO,
    WO,
    x_stride,
    PERIOD,
    C: tl.constexpr,
    CR: tl.constexpr,
    CO: tl.constexpr,
    G: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIX: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (pixel blocks x groups x output-channel blocks of a group, 2), output channels fastest; U3, then U1."""
    CG: tl.constexpr = CR // G
    CENTRE_H: tl.constexpr = DILATION_H * (KH - 1) // 2 - PAD_H
    CENTRE_W: tl.constexpr = DILATION_W * (KW - 1) // 2 - PAD_W

    group, co, co_mask, pixel, in_range, sample, row, column = output_block(pixels, HO, WO, CO, G, BLOCK_PIX, BLOCK_CO)
    block = tl.program_id(0) // (G * tl.cdiv(CO // G, BLOCK_CO))
    redundant = tl.program_id(1) == 1

    acc = tl.zeros((BLOCK_PIX, BLOCK_CO), tl.float32)
    acc = add_pointwise(
        acc, x_ptr + tl.where(redundant, CR, 0), tl.where(redundant, redundant_ptr, pwc_ptr),
        sample, row, column, in_range, co, co_mask, H, W, x_stride,
        tl.where(redundant, C - CR, CR), STRIDE_H, STRIDE_W, CENTRE_H, CENTRE_W, BLOCK_C, PRECISION,
    )  # fmt: skip
    if not redundant:
        acc = add_taps(
            acc, x_ptr + group * CG, gwc_ptr, sample, row, column, in_range, co, co_mask, H, W, x_stride,
            CG, KH, KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, BLOCK_C, PRECISION,
        )  # fmt: skip

    channel = tl.where(redundant, CO, 0) + co
    u = acc.to(u_ptr.dtype.element_ty)
    out = u_ptr + pixel.to(tl.int64)[:, None] * (2 * CO) + channel[None, :]
    tl.store(out, u, mask=in_range[:, None] & co_mask[None, :])
    # Moments of what is stored: rounded, so that what the norm reads has exactly the mean that it subtracts.
    store_moments(
        u.to(tl.float32), sample, in_range, block, channel, co_mask, mean_ptr, square_ptr, pixels, HO * WO, PERIOD,
        2 * CO, BLOCK_PIX,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "P"])
def norm_gate(
    sample_mean_ptr,  # [N, 2 C] float32
    sample_square_ptr,  # [N, 2 C] float32
    weight3_ptr,  # [C]
    bias3_ptr,  # [C]
    weight1_ptr,  # [C]
    bias1_ptr,  # [C]
    bias_ptr,  # [C]; read only if BIAS
    batch_ptr,  # mean, variance, 1 / sqrt(variance + eps) [3, 2 C] float32
    gate_ptr,  # d [N, C] float32
    planes_ptr,  # scale3, scale1, offset [3, N, C] float32
    N,
    P,
    eps3,
    eps1,
    C: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (channel blocks,)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    mean3, variance3 = batch_moments(sample_mean_ptr, sample_square_ptr, c, c_mask, N, P, 2 * C, BLOCK_N, BLOCK_C)
    mean1, variance1 = batch_moments(
        sample_mean_ptr + C, sample_square_ptr + C, c, c_mask, N, P, 2 * C, BLOCK_N, BLOCK_C
    )
    r3 = 1.0 / tl.sqrt(variance3 + eps3)
    r1 = 1.0 / tl.sqrt(variance1 + eps1)
    out = batch_ptr + c
    tl.store(out, mean3, mask=c_mask)
    tl.store(out + C, mean1, mask=c_mask)
    tl.store(out + 2 * C, variance3, mask=c_mask)
    tl.store(out + 3 * C, variance1, mask=c_mask)
    tl.store(out + 4 * C, r3, mask=c_mask)
    tl.store(out + 5 * C, r1, mask=c_mask)
    gain3 = tl.load(weight3_ptr + c, mask=c_mask, other=0.0).to(tl.float32) * r3
    gain1 = tl.load(weight1_ptr + c, mask=c_mask, other=0.0).to(tl.float32) * r1
    b3 = tl.load(bias3_ptr + c, mask=c_mask, other=0.0).to(tl.float32)
    b1 = tl.load(bias1_ptr + c, mask=c_mask, other=0.0).to(tl.float32)
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + c, mask=c_mask, other=0.0).to(tl.float32)
    plane = tl.cast(N, tl.int64) * C
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & c_mask[None, :]
        means = sample_mean_ptr + n[:, None] * (2 * C) + c[None, :]
        s3 = gain3[None, :] * (tl.load(means, mask=mask, other=0.0) - mean3[None, :]) + b3[None, :]
        s1 = gain1[None, :] * (tl.load(means + C, mask=mask, other=0.0) - mean1[None, :]) + b1[None, :]
        d = s3 - s1
        beta = sigmoid(d)
        gamma = sigmoid(-d)
        offset = n[:, None] * C + c[None, :]
        tl.store(gate_ptr + offset, d, mask=mask)
        tl.store(planes_ptr + offset, beta * gain3[None, :], mask=mask)
        tl.store(planes_ptr + plane + offset, gamma * gain1[None, :], mask=mask)
        shift = beta * b3[None, :] + gamma * b1[None, :] + bias[None, :]
        tl.store(planes_ptr + 2 * plane + offset, shift, mask=mask)


@autotuned(FUSION, FUSION_KEY, prune_channels)
@triton.jit(do_not_specialize=["N", "P"])
def norm_blend(
    u_ptr,  # [N, P, 2 C]
    batch_ptr,  # mean first [3, 2 C] float32
    planes_ptr,  # scale3, scale1, offset [3, N, C] float32
    y_ptr,  # [N, P, C]
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
    plane = tl.cast(N, tl.int64) * C
    planes = planes_ptr + sample.to(tl.int64) * C + c
    scale3 = tl.load(planes, mask=c_mask, other=0.0)
    scale1 = tl.load(planes + plane, mask=c_mask, other=0.0)
    shift = tl.load(planes + 2 * plane, mask=c_mask, other=0.0)
    mean3 = tl.load(batch_ptr + c, mask=c_mask, other=0.0)
    mean1 = tl.load(batch_ptr + C + c, mask=c_mask, other=0.0)
    mask = (pixel < P)[:, None] & c_mask[None, :]
    row = (sample.to(tl.int64) * P + pixel)[:, None]
    u3 = tl.load(u_ptr + row * (2 * C) + c[None, :], mask=mask, other=0.0).to(tl.float32)
    u1 = tl.load(u_ptr + row * (2 * C) + (C + c)[None, :], mask=mask, other=0.0).to(tl.float32)
    y = scale3[None, :] * (u3 - mean3[None, :]) + scale1[None, :] * (u1 - mean1[None, :]) + shift[None, :]
    tl.store(y_ptr + row * C + c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
