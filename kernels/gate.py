"""The gate from the statistics of x, before any convolution.

GAP is linear, so S3 and S1 are the layer's weights applied to the mean of what each tap reads:

    S3[n, m] = sum_{tap, c in group} Wg[m, c, tap] win[n, tap, c] / P + sum_c Wp[m, c] pool[n, c] / P + b3[m]
    S1[n, m] = sum_c W1[m, c] pool[n, c] / P + b1[m]

with P output pixels. beta = 1 / (1 + r) and gamma = r / (1 + r) with r = exp(S1 - S3). The planes that the convolution
applies are

    ratio  = min(r, e^60)                      what the redundant sum counts beside the representative one
    scale  = a beta                            what the total is multiplied by
    offset = a (beta b3 + gamma b1) + bias

where a [M] is 1, or in inference the scale of a norm that follows and whose shift is in the bias.

The clamp keeps ratio finite; at it beta is 1e-26, far below what any output can show. A plane whose S3 or S1 is not
finite is NaN, as a softmax over an infinite mean is. (If the mean is -inf, the softmax makes the branch 0 and keeps the
plane's finite pixels; one accumulator cannot.)

A layer of one image waits for this launch, which has little to do but to wait for memory. So every one of few samples
has programs of its own for every few output channels, which load all that they need before they multiply; more samples
share what is loaded, in a product for a block of them, and K is walked in long steps.
"""

import triton
import triton.language as tl

from .overlap import let_next_begin, wait_for_previous
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
def _add_pointwise_terms(
    terms,  # [FEW_CO, BLOCK_K]
    partial_ptr,
    weight_ptr,  # [CO, K]
    sample,  # offset into partial
    co,
    co_mask,
    share,
    split_stride,
    CHANNEL: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    POOL_ROW: tl.constexpr,
    TAPS: tl.constexpr,
    SIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """terms plus SIGN times a point-wise weight times the mean of what it reads, not summed over K yet."""
    for k0 in tl.static_range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = k < K
        mean = _pooled_mean(partial_ptr, sample + CHANNEL + k, mask, share, SPLITS, split_stride, C, POOL_ROW, TAPS)
        w = tl.load(weight_ptr + co[:, None] * K + k[None, :], mask=co_mask[:, None] & mask[None, :], other=0.0)
        terms += SIGN * mean[None, :] * w.to(tl.float32)
    return terms


@triton.jit
def _difference_of_sample(
    partial_ptr,
    gwc_ptr,
    pwc_ptr,
    redundant_ptr,
    sample,  # offset into partial
    co,  # [FEW_CO]
    co_mask,
    group,
    share,
    split_stride,
    C: tl.constexpr,
    CR: tl.constexpr,
    G: tl.constexpr,
    TAPS: tl.constexpr,
    SPLITS: tl.constexpr,
    POOL_ROW: tl.constexpr,
    FEW_CO: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """S1 - S3 of one sample without the branch biases, [FEW_CO].

    Nothing waits between the first load and the last: there is no loop, and one sum over threads.
    """
    CG: tl.constexpr = CR // G
    terms = _add_pointwise_terms(
        tl.zeros((FEW_CO, BLOCK_K), tl.float32), partial_ptr, redundant_ptr, sample, co, co_mask, share, split_stride,
        CR, C - CR, C, SPLITS, POOL_ROW, TAPS, 1, BLOCK_K,
    )  # fmt: skip
    terms = _add_pointwise_terms(
        terms, partial_ptr, pwc_ptr, sample, co, co_mask, share, split_stride,
        0, CR, C, SPLITS, POOL_ROW, TAPS, -1, BLOCK_K,
    )  # fmt: skip
    for k0 in tl.static_range(0, TAPS * CG, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = k < TAPS * CG
        row = k // CG * C + group * CG + k % CG
        mean = _mean(partial_ptr, sample + row, mask, share, SPLITS, split_stride)
        rows = gwc_ptr + co[:, None] * (TAPS * CG)
        w = tl.load(rows + k[None, :], mask=co_mask[:, None] & mask[None, :], other=0.0)
        terms -= mean[None, :] * w.to(tl.float32)
    return tl.sum(terms, 1)


@triton.jit
def _store_means(
    partial_ptr,
    tap_mean_ptr,
    pool_mean_ptr,
    n,
    sample,  # offset into partial
    group,
    share,
    split_stride,
    C: tl.constexpr,
    CR: tl.constexpr,
    G: tl.constexpr,
    TAPS: tl.constexpr,
    SPLITS: tl.constexpr,
    POOL_ROW: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of a group's taps, and with the first group of what the point-wise convolutions read."""
    CG: tl.constexpr = CR // G
    for k0 in range(0, TAPS * CG, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = k < TAPS * CG
        tap, channel = k // CG, group * CG + k % CG
        mean = _mean(partial_ptr, sample + tap * C + channel, mask, share, SPLITS, split_stride)
        tl.store(tap_mean_ptr + n * (TAPS * CR) + tap * CR + channel, mean, mask=mask)
    if group == 0:
        for k0 in range(0, C, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            mask = k < C
            mean = _pooled_mean(partial_ptr, sample + k, mask, share, SPLITS, split_stride, C, POOL_ROW, TAPS)
            tl.store(pool_mean_ptr + n * C + k, mean, mask=mask)


@triton.jit
def _difference(
    partial_ptr,
    gwc_ptr,
    pwc_ptr,
    redundant_ptr,
    tap_mean_ptr,
    pool_mean_ptr,
    n,  # [BLOCK_N, 1]
    n_mask,
    co,  # [BLOCK_CO]
    co_mask,
    group,
    is_first,  # of the group's programs
    share,
    split_stride,
    C: tl.constexpr,
    CR: tl.constexpr,
    G: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    POOL_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """S1 - S3 without the branch biases, [BLOCK_N, BLOCK_CO].

    One loop over the three weights, one behind the other: each loop more would wait for its first loads.
    """
    CG: tl.constexpr = CR // G
    CRED: tl.constexpr = C - CR
    PWC: tl.constexpr = (CRED + BLOCK_C - 1) // BLOCK_C  # its first step
    GWC: tl.constexpr = PWC + (CR + BLOCK_C - 1) // BLOCK_C
    STEPS: tl.constexpr = GWC + (TAPS * CG + BLOCK_C - 1) // BLOCK_C
    # What is loaded ahead is in shared memory, every split by itself.
    STAGES: tl.constexpr = 2 if SPLITS * (2 if POOL_ROW == TAPS else 1) > 4 else 3
    samples = n.to(tl.int64) * ROWS * C
    difference = tl.zeros((BLOCK_N, BLOCK_CO), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        of_redundant, of_gwc = step < PWC, step >= GWC
        weight_ptr = tl.where(of_redundant, redundant_ptr, tl.where(of_gwc, gwc_ptr, pwc_ptr))
        columns = tl.where(of_redundant, CRED, tl.where(of_gwc, TAPS * CG, CR))
        k = (step - tl.where(of_redundant, 0, tl.where(of_gwc, GWC, PWC))) * BLOCK_C + tl.arange(0, BLOCK_C)
        k_mask = k < columns
        tap = tl.where(of_gwc, k // CG, 0)
        channel = tl.where(of_gwc, group * CG + k % CG, tl.where(of_redundant, CR, 0) + k)
        row = tl.where(of_gwc, tap, POOL_ROW) * C + channel
        mask = n_mask & k_mask[None, :]
        mean = _mean(partial_ptr, samples + row[None, :], mask, share, SPLITS, split_stride)
        if POOL_ROW == TAPS:
            low = mask & (step < GWC)
            mean += _mean(partial_ptr, samples + (row + C)[None, :], low, share, SPLITS, split_stride)
        if is_first & (of_gwc | (group == 0)):
            mean_ptr = tl.where(of_gwc, tap_mean_ptr, pool_mean_ptr)
            kept = n * tl.where(of_gwc, TAPS * CR, C) + (tap * CR + channel)[None, :]
            tl.store(mean_ptr + kept, mean, mask=mask)
        w = tl.load(weight_ptr + co[:, None] * columns + k[None, :], mask=co_mask[:, None] & k_mask[None, :], other=0.0)
        difference = dot_float32(tl.where(of_redundant, mean, -mean), tl.trans(w), difference, PRECISION)
    return difference


@triton.jit
def _store_planes(
    difference,  # S1 - S3 without the branch biases
    plane,  # where it belongs in a plane
    mask,
    co,  # as the last axis of these
    co_mask,
    bias_ptr,
    branch_bias_ptr,
    norm_scale_ptr,
    ratio_ptr,
    scale_ptr,
    offset_ptr,
    CO: tl.constexpr,
    BIAS: tl.constexpr,
    BRANCH_BIAS: tl.constexpr,
    NORM_SCALE: tl.constexpr,
):
    """ratio, scale and offset of a block, from its S1 - S3."""
    b3 = tl.zeros(co.shape, tl.float32)
    b1 = tl.zeros(co.shape, tl.float32)
    if BRANCH_BIAS:
        b3 += tl.load(branch_bias_ptr + co, mask=co_mask, other=0.0).to(tl.float32)
        b1 += tl.load(branch_bias_ptr + CO + co, mask=co_mask, other=0.0).to(tl.float32)
    exponent = difference + b1 - b3
    # The difference is 0, or NaN where the exponent is not finite: a minimum may drop NaN.
    ratio = tl.exp(tl.minimum(exponent, MAX_EXPONENT)) + (exponent - exponent)
    beta = 1.0 / (1.0 + ratio)
    scale = beta
    if NORM_SCALE:
        scale *= tl.load(norm_scale_ptr + co, mask=co_mask, other=0.0).to(tl.float32)
    offset = scale * b3 + ratio * scale * b1
    if BIAS:
        offset += tl.load(bias_ptr + co, mask=co_mask, other=0.0).to(tl.float32)
    tl.store(ratio_ptr + plane, ratio, mask=mask)
    tl.store(scale_ptr + plane, scale, mask=mask)
    tl.store(offset_ptr + plane, offset, mask=mask)


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
    PRECISION: tl.constexpr,  # see dot_float32
    FEW: tl.constexpr,  # samples
    FEW_CO: tl.constexpr,  # output channels of a program, of so few
    OVERLAP: tl.constexpr,  # see overlap
    BLOCK_N: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (output-channel blocks of a group x groups x sample blocks,), output channels fastest.

    Up to FEW samples, each has as many sample blocks as there are FEW_CO in BLOCK_CO. A group's first program of a
    sample block, or of a sample, also stores the means of the group's channels, and that of the first group those of
    pool.
    """
    COG: tl.constexpr = CO // G
    CO_BLOCKS: tl.constexpr = (COG + BLOCK_CO - 1) // BLOCK_CO
    PARTS: tl.constexpr = BLOCK_CO // FEW_CO
    # Columns that a program of few samples loads at a time: of FEW_CO rows 16 or 32 a thread, and where sums come in
    # many parts, each of which is loaded too, half as many.
    FEW_K: tl.constexpr = max(512, 8 * BLOCK_C) // (2 if SPLITS > 4 else 1)
    wait_for_previous(OVERLAP)
    pid = tl.program_id(0)
    co_block = pid % CO_BLOCKS
    group = pid // CO_BLOCKS % G
    block = pid // (CO_BLOCKS * G)
    split_stride = tl.cast(N, tl.int64) * ROWS * C
    share = 1.0 / tl.cast(P, tl.float32)
    if FEW > 0 and N <= FEW:
        let_next_begin(OVERLAP)
        one = block // PARTS
        sample = one.to(tl.int64) * ROWS * C
        within = co_block * BLOCK_CO + block % PARTS * FEW_CO + tl.arange(0, FEW_CO)
        m = group * COG + within
        m_mask = within < COG
        of_sample = _difference_of_sample(
            partial_ptr, gwc_ptr, pwc_ptr, redundant_ptr, sample, m, m_mask, group, share, split_stride,
            C, CR, G, TAPS, SPLITS, POOL_ROW, FEW_CO, FEW_K,
        )  # fmt: skip
        _store_planes(
            of_sample, one * CO + m, m_mask, m, m_mask, bias_ptr, branch_bias_ptr, norm_scale_ptr,
            ratio_ptr, scale_ptr, offset_ptr, CO, BIAS, BRANCH_BIAS, NORM_SCALE,
        )  # fmt: skip
        if (co_block == 0) & (block % PARTS == 0):  # behind the planes, which the convolution waits for
            _store_means(
                partial_ptr, tap_mean_ptr, pool_mean_ptr, one, sample, group, share, split_stride,
                C, CR, G, TAPS, SPLITS, POOL_ROW, FEW_K,
            )  # fmt: skip
    else:
        in_group = co_block * BLOCK_CO + tl.arange(0, BLOCK_CO)
        co = group * COG + in_group
        co_mask = in_group < COG
        n = (block * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
        n_mask = n < N
        difference = _difference(
            partial_ptr, gwc_ptr, pwc_ptr, redundant_ptr, tap_mean_ptr, pool_mean_ptr, n, n_mask, co, co_mask, group,
            co_block == 0, share, split_stride,
            C, CR, G, TAPS, ROWS, SPLITS, POOL_ROW, PRECISION, BLOCK_N, BLOCK_CO, BLOCK_C,
        )  # fmt: skip
        _store_planes(
            difference, n * CO + co[None, :], n_mask & co_mask[None, :], co[None, :], co_mask[None, :],
            bias_ptr, branch_bias_ptr, norm_scale_ptr, ratio_ptr, scale_ptr, offset_ptr,
            CO, BIAS, BRANCH_BIAS, NORM_SCALE,
        )  # fmt: skip
