"""The gate from the statistics of x, before any convolution.

GAP is linear, so S3 and S1 are the layer's weights applied to the mean of what each tap reads:

    S3[n, m] = sum_{tap, c in group} Wg[m, c, tap] win[n, tap, c] / P + sum_c Wp[m, c] pool[n, c] / P + b3[m]
    S1[n, m] = sum_c W1[m, c] pool[n, c] / P + b1[m]

with P output pixels. beta = 1 / (1 + r) and gamma = r / (1 + r) with r = exp(S1 - S3). The planes that the convolution
applies are

    ratio  = min(r, e^60)                      what the redundant sum is multiplied by before the rest is added
    scale  = a beta                            what the total is multiplied by
    offset = a (beta b3 + gamma b1) + bias

where a [M] is 1, or in inference the scale of a norm that follows and whose shift is in the bias.

The clamp keeps ratio finite; at it beta is 1e-26, far below what any output can show. A plane whose S3 or S1 is not
finite is NaN, as a softmax over an infinite mean is. (If the mean is -inf, the softmax makes the branch 0 and keeps the
plane's finite pixels; one accumulator cannot.)

With PACK further programs of the same launch write the weights as the one matrix that the descriptor kernel reads
(:mod:`.packing` says which and why here).

A layer of one image waits for this launch, which has little to do: K is walked in long steps, over taps and channels
alike, because a step takes as long as memory takes to answer.
"""

import triton
import triton.language as tl

from .packing import packed_weight
from .tiles import dot_float32
from .tuning import GATE, GATE_KEY, autotuned, prune_gate

MAX_EXPONENT = tl.constexpr(60.0)


@triton.jit
def _mean(partial_ptr, offset, mask, share, SPLITS: tl.constexpr, split_stride):
    """Sum of the splits in fixed order, times ``share``, 1 / P."""
    total = tl.load(partial_ptr + offset, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial_ptr + split * split_stride + offset, mask=mask, other=0.0)
    return total * share


@triton.jit
def _pooled_mean(
    partial_ptr,
    offset,
    mask,
    share,
    SPLITS: tl.constexpr,
    split_stride,
    C: tl.constexpr,
    POOL_ROW: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Mean of pool(x): the centre tap's row at stride 1, else the two rows after the taps."""
    mean = _mean(partial_ptr, offset + POOL_ROW * C, mask, share, SPLITS, split_stride)
    if POOL_ROW == TAPS:
        mean += _mean(partial_ptr, offset + (POOL_ROW + 1) * C, mask, share, SPLITS, split_stride)
    return mean


@triton.jit
def _apply(
    s,  # [BLOCK_N, BLOCK_CO]
    partial_ptr,
    weight_ptr,  # [CO, K]
    mean_ptr,  # [N, ...]
    samples,  # [BLOCK_N, 1], offsets into partial
    n,
    n_mask,
    co,
    co_mask,
    stores,
    share,
    split_stride,
    CHANNEL: tl.constexpr,
    K: tl.constexpr,
    MEAN_STRIDE: tl.constexpr,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    POOL_ROW: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """s plus a point-wise weight times the mean of what it reads, which is stored if ``stores``."""
    for k0 in range(0, K, BLOCK_C):
        k = k0 + tl.arange(0, BLOCK_C)
        k_mask = (k < K)[None, :]
        mask = n_mask[:, None] & k_mask
        channel = (CHANNEL + k)[None, :]
        mean = _pooled_mean(partial_ptr, samples + channel, mask, share, SPLITS, split_stride, C, POOL_ROW, TAPS)
        if stores:
            tl.store(mean_ptr + n[:, None] * MEAN_STRIDE + channel, mean, mask=mask)
        w = tl.load(weight_ptr + co[:, None] * K + k[None, :], mask=co_mask[:, None] & k_mask, other=0.0)
        s = dot_float32(mean, tl.trans(w), s, PRECISION)
    return s


@autotuned(GATE, GATE_KEY, prune_gate)
@triton.jit(do_not_specialize=["N", "P"])
def gate_planes(
    partial_ptr,  # [SPLITS, N, ROWS, C] float32
    gwc_ptr,  # [CO, KH KW, CG]
    pwc_ptr,  # [CO, CR]
    redundant_ptr,  # [CO, C - CR]
    bias_ptr,  # [CO]; read only if BIAS
    branch_bias_ptr,  # [2, CO]; read only if BRANCH_BIAS
    norm_scale_ptr,  # [CO]; read only if NORM_SCALE
    ratio_ptr,  # [N, CO] float32
    scale_ptr,  # [N, CO] float32
    offset_ptr,  # [N, CO] float32
    tap_mean_ptr,  # [N, KH KW, CR], for the backward
    pool_mean_ptr,  # [N, C], for the backward
    packed_ptr,  # [CO, (C - CR) + (CR - CG') + 9 CG'], CG' = MERGE CR / G; written only if PACK
    N,
    P,
    C: tl.constexpr,
    CR: tl.constexpr,
    CO: tl.constexpr,
    G: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    POOL_ROW: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    BRANCH_BIAS: tl.constexpr,
    NORM_SCALE: tl.constexpr,
    PACK: tl.constexpr,
    MERGE: tl.constexpr,  # groups merged into one, if PACK
    STRIDE: tl.constexpr,  # of the layer, if PACK
    PRECISION: tl.constexpr,  # see dot_float32
    BLOCK_N: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (output-channel blocks of a group x groups x (sample blocks + blocks of packed columns),), output channels
    fastest, the packing programs last.

    The first output-channel block of a group also stores the means of the group's channels, and that of the first
    group those of pool.
    """
    CG: tl.constexpr = CR // G
    COG: tl.constexpr = CO // G
    CRED: tl.constexpr = C - CR
    CO_BLOCKS: tl.constexpr = (COG + BLOCK_CO - 1) // BLOCK_CO
    pid = tl.program_id(0)
    co_block = pid % CO_BLOCKS
    group = pid // CO_BLOCKS % G
    in_group = co_block * BLOCK_CO + tl.arange(0, BLOCK_CO)
    co = group * COG + in_group
    co_mask = in_group < COG
    block = pid // (CO_BLOCKS * G)
    sample_blocks = tl.cdiv(N, BLOCK_N)
    if block < sample_blocks:
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        n_mask = n < N
        split_stride = tl.cast(N, tl.int64) * ROWS * C
        samples = n.to(tl.int64)[:, None] * ROWS * C
        stores = (co_block == 0) & (group == 0)
        share = 1.0 / tl.cast(P, tl.float32)
        s1 = _apply(
            tl.zeros((BLOCK_N, BLOCK_CO), tl.float32), partial_ptr, redundant_ptr, pool_mean_ptr, samples, n, n_mask,
            co, co_mask, stores, share, split_stride, CR, CRED, C, C, SPLITS, POOL_ROW, TAPS, PRECISION, BLOCK_C,
        )  # fmt: skip
        s3 = _apply(
            tl.zeros((BLOCK_N, BLOCK_CO), tl.float32), partial_ptr, pwc_ptr, pool_mean_ptr, samples, n, n_mask,
            co, co_mask, stores, share, split_stride, 0, CR, C, C, SPLITS, POOL_ROW, TAPS, PRECISION, BLOCK_C,
        )  # fmt: skip
        for k0 in range(0, TAPS * CG, BLOCK_C):
            k = k0 + tl.arange(0, BLOCK_C)
            k_mask = (k < TAPS * CG)[None, :]
            mask = n_mask[:, None] & k_mask
            tap = k // CG
            channel = group * CG + k % CG
            mean = _mean(partial_ptr, samples + (tap * C + channel)[None, :], mask, share, SPLITS, split_stride)
            if co_block == 0:
                tl.store(tap_mean_ptr + n[:, None] * (TAPS * CR) + (tap * CR + channel)[None, :], mean, mask=mask)
            rows = gwc_ptr + co[:, None] * (TAPS * CG)
            w = tl.load(rows + k[None, :], mask=co_mask[:, None] & k_mask, other=0.0)
            s3 = dot_float32(mean, tl.trans(w), s3, PRECISION)

        b3 = tl.zeros((BLOCK_CO,), tl.float32)
        b1 = tl.zeros((BLOCK_CO,), tl.float32)
        if BRANCH_BIAS:
            b3 += tl.load(branch_bias_ptr + co, mask=co_mask, other=0.0).to(tl.float32)
            b1 += tl.load(branch_bias_ptr + CO + co, mask=co_mask, other=0.0).to(tl.float32)
        exponent = s1 + b1[None, :] - s3 - b3[None, :]
        # The difference is 0, or NaN where the exponent is not finite: a minimum may drop NaN.
        ratio = tl.exp(tl.minimum(exponent, MAX_EXPONENT)) + (exponent - exponent)
        beta = 1.0 / (1.0 + ratio)
        scale = beta
        if NORM_SCALE:
            scale *= tl.load(norm_scale_ptr + co, mask=co_mask, other=0.0).to(tl.float32)[None, :]
        offset = scale * b3[None, :] + ratio * scale * b1[None, :]
        if BIAS:
            offset += tl.load(bias_ptr + co, mask=co_mask, other=0.0).to(tl.float32)[None, :]
        plane = n[:, None] * CO + co[None, :]
        mask = n_mask[:, None] & co_mask[None, :]
        tl.store(ratio_ptr + plane, ratio, mask=mask)
        tl.store(scale_ptr + plane, scale, mask=mask)
        tl.store(offset_ptr + plane, offset, mask=mask)
    elif PACK:
        COLUMNS: tl.constexpr = C + (TAPS - 1) * MERGE * CG
        k = (block - sample_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
        held = co_mask[:, None] & (k < COLUMNS)[None, :]
        packed = packed_weight(gwc_ptr, pwc_ptr, redundant_ptr, co, k, held, group, C, CR, G, MERGE, STRIDE)
        pointers = packed_ptr + co[:, None] * COLUMNS + k[None, :]
        tl.store(pointers, packed.to(packed_ptr.dtype.element_ty), mask=held)
