"""What is left of the backward once the weight-gradient kernel has run: two small reductions, in fixed order.

The weight gradient leaves partial sums, over splits of the samples, of sum_n beta_n G_n (gamma_n for the redundant
weight), and parts of A, with the sign of the derivative of S3 - S1. With the notation of :mod:`.backward` and
B[n, m] = sum_p g, per (sample n, channel m):

    A3 = sum of its parts + b3 B,    A1 = sum of its parts + b1 B          (b3, b1 branch biases, if there are any)
    delta = beta gamma (A3 - A1)
    db3   = sum_n (beta B + delta),  db1 = sum_n (gamma B - delta)
    dWp   = sum of the partials + sum_n delta_n mean_p x[n, p at k],       likewise dWg; dW1 with -delta_n

``gate_grad`` makes delta / P, which the input gradient needs as well; ``finish_weights`` the rest, straight into the
gradients, in their dtype and strides. Programs of its own there prepare the input gradient of
:mod:`.backward_descriptor`: the packed weights and the planes of the constant that are described there. Packing is a
by-product, so there is no cache that an optimizer step or a graph could find stale.
"""

import triton
import triton.language as tl

from .tiles import dot_any_range, dot_float32

PLANE_COLUMNS = tl.constexpr(16)
"""A power of two of at least ten: the taps, and the point-wise convolution."""


@triton.jit(do_not_specialize=["N", "P", "SLICES"])
def gate_grad(
    inner_ptr,  # parts of A [K_BLOCKS, N, SLICES, CO] float32
    ratio_ptr,  # gamma / beta [N, CO] float32
    grad_ptr,  # g [N, P, CO]; this and the next are read only if BRANCH_BIAS
    branch_bias_ptr,  # [2, CO]
    shift_ptr,  # delta / P [N, CO] float32
    terms_ptr,  # each sample's part of db3, db1 [2, N, CO] float32; written only if BRANCH_BIAS
    gate_ptr,  # beta, gamma [2, N, CO] float32; written only if PREPARE
    N,
    P,
    SLICES,
    CO: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    REDUNDANT_BLOCKS: tl.constexpr,  # the first of the K blocks; they make A1
    BRANCH_BIAS: tl.constexpr,
    PREPARE: tl.constexpr,
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
    tl.store(shift_ptr + plane, delta / tl.cast(P, tl.float32), mask=co_mask)
    if PREPARE:
        tl.store(gate_ptr + plane, beta, mask=co_mask)
        tl.store(gate_ptr + N * CO + plane, gamma, mask=co_mask)
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


@triton.jit
def _reads_window(tap, STRIDE: tl.constexpr):
    """Whether a 3 x 3 tap reads a pixel of the window that the point-wise convolutions average."""
    return (tap // 3 >= 1) & (tap // 3 <= STRIDE) & (tap % 3 >= 1) & (tap % 3 <= STRIDE)


@triton.jit
def _pack_weights(
    program,
    gwc_ptr,
    pwc_ptr,
    redundant_ptr,
    packed_ptr,
    C: tl.constexpr,
    CR: tl.constexpr,
    CO: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    MERGE: tl.constexpr,
    MIXED: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A block of the packed weights."""
    CG: tl.constexpr = CR // G
    COG: tl.constexpr = CO // G
    CM: tl.constexpr = CG * MERGE
    COM: tl.constexpr = COG * MERGE
    CRED: tl.constexpr = C - CR
    COLUMN_BLOCKS: tl.constexpr = (C + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    row = (program // COLUMN_BLOCKS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    c = (program % COLUMN_BLOCKS * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    mask = (row < ROWS) & (c < C)
    representative = c < CR
    tap = (row - (CO - COM)) // COM
    is_tap = row >= CO - COM
    first = c // CM * COM
    co = tl.where(is_tap, first + (row - (CO - COM)) % COM, (first + COM + row) % CO)
    own = is_tap & (co // COG == c // CG)
    gwc = tl.load(gwc_ptr + co * (9 * CG) + tap * CG + c % CG, mask=mask & representative & own, other=0.0).to(
        tl.float32
    )
    held = (_reads_window(tap, STRIDE) & is_tap) | (row < CO - COM)
    pwc = tl.load(pwc_ptr + co * CR + c, mask=mask & representative & held, other=0.0).to(tl.float32)
    if MIXED:
        co = row % CO
        held = _reads_window(row // CO, STRIDE)
    else:
        co = row
        held = row < CO
    held &= (c >= CR) & mask
    redundant = tl.load(redundant_ptr + co * CRED + c - CR, mask=held, other=0.0).to(tl.float32)
    packed = gwc + (pwc + redundant) * (1.0 / (STRIDE * STRIDE))
    tl.store(packed_ptr + row * C + c, packed.to(packed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _constant_planes(
    program,
    shift_ptr,
    gwc_ptr,
    pwc_ptr,
    redundant_ptr,
    constant_ptr,
    N,
    C: tl.constexpr,
    CR: tl.constexpr,
    CO: tl.constexpr,
    G: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_CO: tl.constexpr,
):
    """The nine planes of the constant, of a block of samples and of channels of a group, or of the redundant ones.

    All weights that a channel has are columns of one product: next to each other the nine taps' and the point-wise
    one's of BLOCK_C channels, or the redundant ones' of as many channels as that makes. A loop for each would wait for
    memory as often again.
    """
    CG: tl.constexpr = CR // G
    COG: tl.constexpr = CO // G
    CRED: tl.constexpr = C - CR
    COLUMNS: tl.constexpr = PLANE_COLUMNS * BLOCK_C
    GROUP_BLOCKS: tl.constexpr = (CG + BLOCK_C - 1) // BLOCK_C
    C_BLOCKS: tl.constexpr = G * GROUP_BLOCKS + (CRED + COLUMNS - 1) // COLUMNS
    POINTWISE: tl.constexpr = 9  # the column behind the taps
    SHARE: tl.constexpr = 1.0 / (STRIDE * STRIDE)
    block = program % C_BLOCKS
    redundant = block >= G * GROUP_BLOCKS
    group = tl.where(redundant, 0, block // GROUP_BLOCKS)
    n = program // C_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    shifts = shift_ptr + n[:, None] * CO

    column = tl.arange(0, COLUMNS)
    tap = column // BLOCK_C
    within = block % GROUP_BLOCKS * BLOCK_C + column % BLOCK_C  # its group
    beyond = (block - G * GROUP_BLOCKS) * COLUMNS + column  # the representative channels
    is_tap = ~redundant & (tap < POINTWISE)
    column_mask = tl.where(redundant, beyond < CRED, (tap <= POINTWISE) & (within < CG))
    weight_ptr = tl.where(is_tap, gwc_ptr + tap * CG + within, pwc_ptr + group * CG + within)
    weight_ptr = tl.where(redundant, redundant_ptr + beyond, weight_ptr)
    weight_stride = tl.where(redundant, CRED, tl.where(is_tap, 9 * CG, CR))
    sums = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
    for m0 in range(0, CO, BLOCK_CO):
        m = m0 + tl.arange(0, BLOCK_CO)
        m_mask = m < CO
        shift = tl.load(shifts + m[None, :], mask=n_mask[:, None] & m_mask[None, :], other=0.0)
        held = column_mask[None, :] & (~is_tap[None, :] | (m // COG == group)[:, None])
        w = tl.load(weight_ptr[None, :] + m[:, None] * weight_stride[None, :], mask=m_mask[:, None] & held, other=0.0)
        sums = dot_any_range(shift, w, sums)

    first = constant_ptr + n[:, None] * C
    plane = tl.cast(N, tl.int64) * C
    if redundant:
        _sums_of_redundant(
            first + (CR + beyond)[None, :], sums * -SHARE, plane, n_mask[:, None] & column_mask[None, :], STRIDE
        )
    else:
        t = tl.arange(0, PLANE_COLUMNS)
        columns = sums.reshape(BLOCK_N, PLANE_COLUMNS, BLOCK_C)
        total = tl.sum(tl.where((t == POINTWISE)[None, :, None], columns, 0.0), 1) * SHARE
        taps = tl.where((t < POINTWISE)[None, :, None], columns, 0.0)
        c = block % GROUP_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
        out = first + (group * CG + c)[None, :]
        mask = n_mask[:, None] & (c < CG)[None, :]
        if STRIDE == 2:
            taps += tl.where(_reads_window(t, STRIDE)[None, :, None], total[:, None, :], 0.0)
            mask_of_taps = mask[:, None, :] & (t < POINTWISE)[None, :, None]
            tl.store(out[:, None, :] + (t * plane)[None, :, None], taps, mask=mask_of_taps)
        else:
            _sums_of_taps(out, total, taps, t, plane, mask)


@triton.jit
def _sums_of_redundant(out, total, plane, mask, STRIDE: tl.constexpr):
    """The planes of redundant channels: the first at stride 1, those of the taps that read the window at stride 2."""
    for tap in tl.static_range(9):
        if (STRIDE == 1 and tap == 0) or (STRIDE == 2 and tap >= 3 and tap % 3 >= 1):
            tl.store(out + tap * plane, total, mask=mask)
        else:
            tl.store(out + tap * plane, tl.zeros_like(total), mask=mask)


@triton.jit
def _sums_of_taps(out, total, taps, tap, plane, mask):
    """The planes at stride 1: the first row of pixels has no use for the taps of the last row, and so on."""
    row = (tap // 3)[None, :, None]
    column = (tap % 3)[None, :, None]
    tl.store(out, total + tl.sum(taps, 1), mask=mask)
    tl.store(out + plane, tl.sum(tl.where(row == 2, taps, 0.0), 1), mask=mask)
    tl.store(out + 2 * plane, tl.sum(tl.where(row == 0, taps, 0.0), 1), mask=mask)
    tl.store(out + 3 * plane, tl.sum(tl.where(column == 2, taps, 0.0), 1), mask=mask)
    tl.store(out + 4 * plane, tl.sum(tl.where(column == 0, taps, 0.0), 1), mask=mask)
    tl.store(out + 5 * plane, tl.sum(tl.where((row == 2) & (column == 2), taps, 0.0), 1), mask=mask)
    tl.store(out + 6 * plane, tl.sum(tl.where((row == 2) & (column == 0), taps, 0.0), 1), mask=mask)
    tl.store(out + 7 * plane, tl.sum(tl.where((row == 0) & (column == 2), taps, 0.0), 1), mask=mask)
    tl.store(out + 8 * plane, tl.sum(tl.where((row == 0) & (column == 0), taps, 0.0), 1), mask=mask)


@triton.jit
def _finish_weights(
    program,
    partial_ptr,
    shift_ptr,
    tap_mean_ptr,
    pool_mean_ptr,
    terms_ptr,
    d_gwc_ptr,
    d_pwc_ptr,
    d_redundant_ptr,
    d_branch_bias_ptr,
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
    C: tl.constexpr,
    CR: tl.constexpr,
    CO: tl.constexpr,
    G: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    GATED: tl.constexpr,
    BRANCH_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    CENTRE: tl.constexpr,  # the tap whose partial sums are left out, being the point-wise ones; -1 if none is
    BLOCK_N: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A block of a weight's gradient; arguments as for the kernel below."""
    CG: tl.constexpr = CR // G
    COG: tl.constexpr = CO // G
    CRED: tl.constexpr = C - CR
    TAPS: tl.constexpr = KH * KW
    CO_BLOCKS: tl.constexpr = (COG + BLOCK_CO - 1) // BLOCK_CO
    REDUNDANT_BLOCKS: tl.constexpr = (CRED + BLOCK_C - 1) // BLOCK_C
    POINTWISE_BLOCKS: tl.constexpr = (CR + BLOCK_C - 1) // BLOCK_C
    TAP_BLOCKS: tl.constexpr = (CG + BLOCK_C - 1) // BLOCK_C
    STORED_TAPS: tl.constexpr = TAPS - 1 if CENTRE >= 0 else TAPS
    WEIGHTS: tl.constexpr = CO * (CRED + CR + STORED_TAPS * CG)

    in_group = program % CO_BLOCKS * BLOCK_CO + tl.arange(0, BLOCK_CO)
    group = program // CO_BLOCKS % G
    co = group * COG + in_group
    co_mask = in_group < COG
    k_block = program // (CO_BLOCKS * G)

    redundant = k_block < REDUNDANT_BLOCKS
    pointwise = k_block < REDUNDANT_BLOCKS + POINTWISE_BLOCKS
    tap_block = tl.where(pointwise, 0, k_block - REDUNDANT_BLOCKS - POINTWISE_BLOCKS)
    tap = tap_block // TAP_BLOCKS
    block = tl.where(redundant, k_block, tl.where(pointwise, k_block - REDUNDANT_BLOCKS, tap_block % TAP_BLOCKS))
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < tl.where(redundant, CRED, tl.where(pointwise, CR, CG))
    mask = co_mask[:, None] & c_mask[None, :]

    stored = tap
    if CENTRE >= 0:
        stored = tl.where(tap > CENTRE, tap - 1, tap)
    weight_stride = tl.where(redundant, CRED, tl.where(pointwise, CR, STORED_TAPS * CG))
    region = tl.where(redundant, 0, tl.where(pointwise, CO * CRED, CO * (CRED + CR) + stored * CG))
    if tap == CENTRE:
        region = CO * CRED + group * CG
        weight_stride = CR
    partial = partial_ptr + region + co[:, None] * weight_stride + c[None, :]
    first = tl.load(partial, mask=mask, other=0.0)  # here, so that the product does not wait for it

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
            if PRECISION != "ieee" and mean.dtype != tl.float32:
                total = dot_any_range(tl.trans(shift), mean, total)
            else:
                total = dot_float32(tl.trans(shift), mean.to(tl.float32), total, PRECISION)
        total *= tl.cast(P, tl.float32) * tl.where(redundant, -1.0, 1.0)

    total += first
    for _ in tl.range(1, SPLITS, num_stages=4):
        partial += WEIGHTS
        total += tl.load(partial, mask=mask, other=0.0)

    out_ptr = tl.where(pointwise, d_pwc_ptr, d_gwc_ptr + tap // KW * gwc_stride_kh + tap % KW * gwc_stride_kw)
    stride_co = tl.where(pointwise, pwc_stride_co, gwc_stride_co)
    stride_c = tl.where(pointwise, pwc_stride_c, gwc_stride_c)
    if CRED > 0:
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


@triton.jit(do_not_specialize=["N", "P", "SPLITS"])
def finish_weights(
    partial_ptr,  # [SPLITS, WEIGHTS] float32, WEIGHTS = CO ((C - CR) + CR + KH KW CG), in this order; see CENTRE
    shift_ptr,  # delta / P [N, CO] float32; this and the next two are read only if GATED
    tap_mean_ptr,  # [N, KH KW, CR]
    pool_mean_ptr,  # [N, C]
    terms_ptr,  # each sample's part of db3, db1 [2, N, CO] float32; read only if BRANCH_BIAS
    d_gwc_ptr,  # [CO, CG, KH, KW], of the strides below
    d_pwc_ptr,  # [CO, CR]
    d_redundant_ptr,  # [CO, C - CR]; written only if C > CR
    d_branch_bias_ptr,  # [2, CO]; written only if BRANCH_BIAS
    gwc_ptr,  # [CO, 3, 3, CG]; this and the next two are read, and the two after them written, only if PREPARE
    pwc_ptr,  # [CO, CR]
    redundant_ptr,  # [CO, C - CR]
    packed_ptr,  # [ROWS, C]
    constant_ptr,  # [9, N, C] float32
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
    C: tl.constexpr,  # CR for the representative branch alone
    CR: tl.constexpr,
    CO: tl.constexpr,
    G: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    GATED: tl.constexpr,
    BRANCH_BIAS: tl.constexpr,
    PREPARE: tl.constexpr,  # also for the input gradient over descriptors, whose sister wrote the partials
    ROWS: tl.constexpr,
    MERGE: tl.constexpr,
    MIXED: tl.constexpr,
    STRIDE: tl.constexpr,  # this and the three before are read only if PREPARE
    CENTRE: tl.constexpr,  # the tap whose partial sums are left out, being the point-wise ones; -1 if none is
    PRECISION: tl.constexpr,  # see dot_float32
    BLOCK_N: tl.constexpr,  # samples of a step
    BLOCK_CO: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_PLANE_N: tl.constexpr,  # samples of a block of the constant's planes
    BLOCK_PLANE: tl.constexpr,  # and channels, of the representative ones
    BLOCK_PLANE_CO: tl.constexpr,  # output channels of a step of such a block
    BLOCK_ROWS: tl.constexpr,  # this and the next are of the packed weights
    BLOCK_COLUMNS: tl.constexpr,
):
    """Grid: (PREPARE: blocks of the constant's planes, blocks of the packed weights; output-channel blocks of a group x
    groups x K blocks,).

    K blocks are blocks of BLOCK_C input channels, as in the weight gradient: of the redundant weight, of the
    point-wise one, of each tap. The programs of the first K block also sum the branch biases' gradients.
    """
    program = tl.program_id(0)
    planes = 0
    packed = 0
    if PREPARE:
        GROUP_BLOCKS: tl.constexpr = (CR // G + BLOCK_PLANE - 1) // BLOCK_PLANE
        COLUMNS: tl.constexpr = PLANE_COLUMNS * BLOCK_PLANE
        C_BLOCKS: tl.constexpr = G * GROUP_BLOCKS + (C - CR + COLUMNS - 1) // COLUMNS
        planes = C_BLOCKS * tl.cdiv(N, BLOCK_PLANE_N)
        packed = tl.cdiv(ROWS, BLOCK_ROWS) * tl.cdiv(C, BLOCK_COLUMNS)
        if program < planes:
            _constant_planes(
                program, shift_ptr, gwc_ptr, pwc_ptr, redundant_ptr, constant_ptr, N, C, CR, CO, G, STRIDE,
                BLOCK_PLANE_N, BLOCK_PLANE, BLOCK_PLANE_CO,
            )  # fmt: skip
        elif program < planes + packed:
            _pack_weights(
                program - planes, gwc_ptr, pwc_ptr, redundant_ptr, packed_ptr, C, CR, CO, G, ROWS, MERGE, MIXED, STRIDE,
                BLOCK_ROWS, BLOCK_COLUMNS,
            )  # fmt: skip
    if program >= planes + packed:
        _finish_weights(
            program - planes - packed, partial_ptr, shift_ptr, tap_mean_ptr, pool_mean_ptr, terms_ptr,
            d_gwc_ptr, d_pwc_ptr, d_redundant_ptr, d_branch_bias_ptr, N, P, SPLITS,
            gwc_stride_co, gwc_stride_c, gwc_stride_kh, gwc_stride_kw, pwc_stride_co, pwc_stride_c,
            redundant_stride_co, redundant_stride_c, bias_stride_branch, bias_stride_co,
            C, CR, CO, G, KH, KW, GATED, BRANCH_BIAS, PRECISION,
            CENTRE, BLOCK_N, BLOCK_CO, BLOCK_C,
        )  # fmt: skip
