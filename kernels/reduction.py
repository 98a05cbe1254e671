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
def _scales(shifts, mask, CO: tl.constexpr):
    """By which power of two each sample's shifts are about 1 at most, and its inverse: half precision holds them then.

    Args:
        shifts: pointers to its first, [BLOCK_N, 1].
        mask: which samples there are.
    """
    BLOCK: tl.constexpr = 128
    largest = tl.zeros((mask.shape[0], BLOCK), tl.float32)
    for m0 in tl.range(0, CO, BLOCK, num_stages=4):
        m = m0 + tl.arange(0, BLOCK)
        shift = tl.load(shifts + m[None, :], mask=mask[:, None] & (m < CO)[None, :], other=0.0)
        largest = tl.maximum(largest, tl.abs(shift))
    exponent = tl.max(largest, 1).to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 1 << 23), 253 << 23)
    return ((254 << 23) - exponent).to(tl.float32, bitcast=True), exponent.to(tl.float32, bitcast=True)


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

    All taps at once, next to each other as columns of one product: one after the other they would wait for memory nine
    times as often.
    """
    CG: tl.constexpr = CR // G
    COG: tl.constexpr = CO // G
    CRED: tl.constexpr = C - CR
    GROUP_BLOCKS: tl.constexpr = (CG + BLOCK_C - 1) // BLOCK_C
    C_BLOCKS: tl.constexpr = G * GROUP_BLOCKS + (CRED + BLOCK_C - 1) // BLOCK_C
    TAPS: tl.constexpr = 16  # a power of two of at least nine
    block = program % C_BLOCKS
    redundant = block >= G * GROUP_BLOCKS
    group = tl.where(redundant, 0, block // GROUP_BLOCKS)
    c = tl.where(redundant, block - G * GROUP_BLOCKS, block % GROUP_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < tl.where(redundant, CRED, CG)
    n = program // C_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    shifts = shift_ptr + n[:, None] * CO

    scale, unscale = _scales(shifts, n_mask, CO)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    weight_ptr = tl.where(redundant, redundant_ptr, pwc_ptr + group * CG)
    weight_stride = tl.where(redundant, CRED, CR)
    m = tl.arange(0, 2 * BLOCK_CO)
    for m0 in tl.range(0, CO, 2 * BLOCK_CO, num_stages=4):
        m_mask = m0 + m < CO
        shift = tl.load(shifts + (m0 + m)[None, :], mask=n_mask[:, None] & m_mask[None, :], other=0.0)
        rows = weight_ptr + (m0 + m)[:, None] * weight_stride
        w = tl.load(rows + c[None, :], mask=m_mask[:, None] & c_mask[None, :], other=0.0)
        total = dot_float32(shift * scale[:, None], w, total, "ieee")
    total *= tl.where(redundant, -1.0, 1.0) * (1.0 / (STRIDE * STRIDE)) * unscale[:, None]

    tap = tl.arange(0, TAPS)
    column = (tap * CG)[None, :, None] + c[None, None, :]
    column_mask = (tap < 9)[None, :, None] & c_mask[None, None, :]
    taps = tl.zeros((BLOCK_N, TAPS * BLOCK_C), tl.float32)
    m = tl.arange(0, BLOCK_CO)
    for m0 in tl.range(0, tl.where(redundant, 0, COG), BLOCK_CO, num_stages=3):
        m_mask = m0 + m < COG
        shift = tl.load(shifts + (group * COG + m0 + m)[None, :], mask=n_mask[:, None] & m_mask[None, :], other=0.0)
        rows = gwc_ptr + (group * COG + m0 + m)[:, None, None] * (9 * CG)
        w = tl.load(rows + column, mask=m_mask[:, None, None] & column_mask, other=0.0)
        taps = dot_float32(shift * scale[:, None], w.reshape(BLOCK_CO, TAPS * BLOCK_C), taps, "ieee")
    taps *= unscale[:, None]
    taps = taps.reshape(BLOCK_N, TAPS, BLOCK_C)
    out = constant_ptr + n[:, None] * C + (tl.where(redundant, CR, group * CG) + c)[None, :]
    mask = n_mask[:, None] & c_mask[None, :]
    plane = tl.cast(N, tl.int64) * C
    if STRIDE == 2:
        taps += tl.where(_reads_window(tap, STRIDE)[None, :, None], total[:, None, :], 0.0)
        for one in tl.static_range(9):  # all at once are as many pointers
            tl.store(out + one * plane, tl.sum(tl.where((tap == one)[None, :, None], taps, 0.0), 1), mask=mask)
    else:
        _sums_of_taps(out, total, taps, tap, plane, mask)


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

    stored = tap
    if CENTRE >= 0:
        stored = tl.where(tap > CENTRE, tap - 1, tap)
    weight_stride = tl.where(redundant, CRED, tl.where(pointwise, CR, STORED_TAPS * CG))
    region = tl.where(redundant, 0, tl.where(pointwise, CO * CRED, CO * (CRED + CR) + stored * CG))
    if tap == CENTRE:
        region = CO * CRED + group * CG
        weight_stride = CR
    partial = partial_ptr + region + co[:, None] * weight_stride + c[None, :]
    for _ in tl.range(0, SPLITS, num_stages=4):
        total += tl.load(partial, mask=mask, other=0.0)
        partial += WEIGHTS

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
    BLOCK_PLANE: tl.constexpr,  # and channels
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
        C_BLOCKS: tl.constexpr = G * GROUP_BLOCKS + (C - CR + BLOCK_PLANE - 1) // BLOCK_PLANE
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
