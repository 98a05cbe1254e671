"""What is left of the backward once the weight-gradient kernel has run: two small reductions, in fixed order.

The weight gradient leaves partial sums, over splits of the samples, of sum_n beta_n G_n (gamma_n for the redundant
weight), and parts of A, with the sign of the derivative of S3 - S1. With the notation of :mod:`.backward` and
B[n, m] = sum_p g, per (sample n, channel m):

    A3 = sum of its parts + b3 B,    A1 = sum of its parts + b1 B          (b3, b1 branch biases, if there are any)
    delta = beta gamma (A3 - A1)
    db3   = sum_n (beta B + delta),  db1 = sum_n (gamma B - delta)
    dWp   = sum of the partials + sum_n delta_n mean_p x[n, p at k],       likewise dWg; dW1 with -delta_n

``gate_grad`` makes delta / P, which the input gradient needs as well; ``finish_weights`` the rest, straight into the
gradients, in their dtype and strides.
"""

import triton
import triton.language as tl

from .tiles import dot


@triton.jit(do_not_specialize=["N", "P", "SLICES"])
def gate_grad(
    inner_ptr,  # parts of A [K_BLOCKS, N, SLICES, CO] float32
    ratio_ptr,  # gamma / beta [N, CO] float32
    grad_ptr,  # g [N, P, CO]; this and the next are read only if BRANCH_BIAS
    branch_bias_ptr,  # [2, CO]
    shift_ptr,  # delta / P [N, CO] float32
    terms_ptr,  # each sample's part of db3, db1 [2, N, CO] float32; written only if BRANCH_BIAS
    N,
    P,
    SLICES,
    CO: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    REDUNDANT_BLOCKS: tl.constexpr,  # the first of the K blocks; they make A1
    BRANCH_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CO: tl.constexpr,
):
    """Grid: (output-channel blocks x N,), channels fastest."""
    CO_BLOCKS: tl.constexpr = (CO + BLOCK_CO - 1) // BLOCK_CO
    co = tl.program_id(0) % CO_BLOCKS * BLOCK_CO + tl.arange(0, BLOCK_CO)
    sample = tl.program_id(0) // CO_BLOCKS
    co_mask = co < CO
    rows = tl.arange(0, BLOCK_ROWS)
    plane = sample * CO + co

    # Row r of a sample is slice r % SLICES of K block r // SLICES.
    total = tl.zeros((BLOCK_ROWS, BLOCK_CO), tl.float32)
    for row0 in range(0, K_BLOCKS * SLICES, BLOCK_ROWS):
        k_block = (row0 + rows) // SLICES
        unit = (k_block * N + sample) * SLICES + (row0 + rows) % SLICES
        mask = (k_block < K_BLOCKS)[:, None] & co_mask[None, :]
        part = tl.load(inner_ptr + unit.to(tl.int64)[:, None] * CO + co[None, :], mask=mask, other=0.0)
        total += tl.where((k_block < REDUNDANT_BLOCKS)[:, None], -part, part)
    difference = tl.sum(total, 0)

    ratio = tl.load(ratio_ptr + plane, mask=co_mask, other=0.0)
    beta = 1.0 / (1.0 + ratio)
    gamma = ratio * beta
    if BRANCH_BIAS:
        sums = tl.zeros((BLOCK_ROWS, BLOCK_CO), tl.float32)
        for pixel0 in tl.range(0, P, BLOCK_ROWS, num_stages=4):
            pixel = sample.to(tl.int64) * P + pixel0 + rows
            mask = (pixel0 + rows < P)[:, None] & co_mask[None, :]
            sums += tl.load(grad_ptr + pixel[:, None] * CO + co[None, :], mask=mask, other=0.0).to(tl.float32)
        grad_sum = tl.sum(sums, 0)
        b3 = tl.load(branch_bias_ptr + co, mask=co_mask, other=0.0).to(tl.float32)
        b1 = tl.load(branch_bias_ptr + CO + co, mask=co_mask, other=0.0).to(tl.float32)
        difference += (b3 - b1) * grad_sum
    delta = beta * gamma * difference
    tl.store(shift_ptr + plane, delta / P.to(tl.float32), mask=co_mask)
    if BRANCH_BIAS:
        tl.store(terms_ptr + plane, beta * grad_sum + delta, mask=co_mask)
        tl.store(terms_ptr + N * CO + plane, gamma * grad_sum - delta, mask=co_mask)


@triton.jit
def _sum_of_samples(terms_ptr, out_ptr, out_stride, co, co_mask, N, CO: tl.constexpr, BLOCK_N: tl.constexpr):
    """out [CO] = sum of terms [N, CO] over the samples, for a block of channels."""
    total = tl.zeros((BLOCK_N, co.shape[0]), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & co_mask[None, :]
        total += tl.load(terms_ptr + n[:, None] * CO + co[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + co * out_stride, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=co_mask)


@triton.jit(do_not_specialize=["N", "P", "SPLITS"])
def finish_weights(
    partial_ptr,  # [SPLITS, WEIGHTS] float32, WEIGHTS = CO ((C - CR) + CR + KH KW CG), in this order
    shift_ptr,  # delta / P [N, CO] float32; this and the next two are read only if GATED
    tap_mean_ptr,  # [N, KH KW, CR]
    pool_mean_ptr,  # [N, C]
    terms_ptr,  # each sample's part of db3, db1 [2, N, CO] float32; read only if BRANCH_BIAS
    d_gwc_ptr,  # [CO, CG, KH, KW], of the strides below
    d_pwc_ptr,  # [CO, CR]
    d_redundant_ptr,  # [CO, C - CR]; written only if GATED
    d_branch_bias_ptr,  # [2, CO]; written only if BRANCH_BIAS
    N,
    P,
    SPLITS,
    gwc_stride_co,
    gwc_stride_c,
    gwc_stride_kh,
    gwc_stride_kw,
    pwc_stride_co,
    pwc_stride_c,
    redundant_stride_co,
    redundant_stride_c,
    bias_stride_branch,
    bias_stride_co,
    C: tl.constexpr,  # CR if not GATED
    CR: tl.constexpr,
    CO: tl.constexpr,
    G: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    GATED: tl.constexpr,
    BRANCH_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (output-channel blocks of a group x groups x K blocks,).

    K blocks are blocks of BLOCK_C input channels, as in the weight gradient: of the redundant weight, of the
    point-wise one, of each tap. The programs of the first K block also sum the branch biases' gradients.
    """
    CG: tl.constexpr = CR // G
    COG: tl.constexpr = CO // G
    CRED: tl.constexpr = C - CR
    TAPS: tl.constexpr = KH * KW
    CO_BLOCKS: tl.constexpr = (COG + BLOCK_CO - 1) // BLOCK_CO
    REDUNDANT_BLOCKS: tl.constexpr = (CRED + BLOCK_C - 1) // BLOCK_C
    POINTWISE_BLOCKS: tl.constexpr = (CR + BLOCK_C - 1) // BLOCK_C
    TAP_BLOCKS: tl.constexpr = (CG + BLOCK_C - 1) // BLOCK_C
    WEIGHTS: tl.constexpr = CO * (CRED + CR + TAPS * CG)

    pid = tl.program_id(0)
    in_group = pid % CO_BLOCKS * BLOCK_CO + tl.arange(0, BLOCK_CO)
    group = pid // CO_BLOCKS % G
    co = group * COG + in_group
    co_mask = in_group < COG
    k_block = pid // (CO_BLOCKS * G)

    redundant = k_block < REDUNDANT_BLOCKS
    pointwise = k_block < REDUNDANT_BLOCKS + POINTWISE_BLOCKS
    tap_block = tl.where(pointwise, 0, k_block - REDUNDANT_BLOCKS - POINTWISE_BLOCKS)
    tap = tap_block // TAP_BLOCKS
    block = tl.where(redundant, k_block, tl.where(pointwise, k_block - REDUNDANT_BLOCKS, tap_block % TAP_BLOCKS))
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < tl.where(redundant, CRED, tl.where(pointwise, CR, CG))
    mask = co_mask[:, None] & c_mask[None, :]

    total = tl.zeros((BLOCK_CO, BLOCK_C), tl.float32)
    if GATED:
        mean_ptr = tl.where(pointwise, pool_mean_ptr, tap_mean_ptr + tap * CR + group * CG)
        mean_ptr += tl.where(redundant, CR, 0)
        mean_stride = tl.where(pointwise, C, TAPS * CR)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            shift = tl.load(
                shift_ptr + n[:, None] * CO + co[None, :], mask=(n < N)[:, None] & co_mask[None, :], other=0.0
            )
            mean = tl.load(
                mean_ptr + n[:, None] * mean_stride + c[None, :], mask=(n < N)[:, None] & c_mask[None, :], other=0.0
            )
            total = dot(tl.trans(shift), mean.to(tl.float32), total, "ieee")
        total *= P.to(tl.float32) * tl.where(redundant, -1.0, 1.0)

    weight_stride = tl.where(redundant, CRED, tl.where(pointwise, CR, TAPS * CG))
    region = tl.where(redundant, 0, tl.where(pointwise, CO * CRED, CO * (CRED + CR) + tap * CG))
    partial = partial_ptr + region + co[:, None] * weight_stride + c[None, :]
    for _ in tl.range(0, SPLITS, num_stages=4):
        total += tl.load(partial, mask=mask, other=0.0)
        partial += WEIGHTS

    out_ptr = tl.where(pointwise, d_pwc_ptr, d_gwc_ptr + tap // KW * gwc_stride_kh + tap % KW * gwc_stride_kw)
    stride_co = tl.where(pointwise, pwc_stride_co, gwc_stride_co)
    stride_c = tl.where(pointwise, pwc_stride_c, gwc_stride_c)
    if GATED:
        out_ptr = tl.where(redundant, d_redundant_ptr, out_ptr)
        stride_co = tl.where(redundant, redundant_stride_co, stride_co)
        stride_c = tl.where(redundant, redundant_stride_c, stride_c)
    out = out_ptr + co[:, None] * stride_co + c[None, :] * stride_c
    tl.store(out, total.to(d_gwc_ptr.dtype.element_ty), mask=mask)

    if BRANCH_BIAS:
        if k_block == 0:
            _sum_of_samples(terms_ptr, d_branch_bias_ptr, bias_stride_co, co, co_mask, N, CO, BLOCK_N)
            d_branch_bias_ptr += bias_stride_branch
            _sum_of_samples(terms_ptr + N * CO, d_branch_bias_ptr, bias_stride_co, co, co_mask, N, CO, BLOCK_N)
