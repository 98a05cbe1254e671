"""Gradients of the layer without U3 and U1, and of the representative branch alone.

With g = dL/dY, P output pixels, beta and gamma = 1 - beta the gate, U3 and U1 the branches, per (sample n, channel m):

    A3    = sum_p g U3,   A1 = sum_p g U1            dL/dbeta = A3 - A1
    delta = beta gamma (A3 - A1)                     dL/d(S3 - S1)
    E3    = beta g + delta / P                       dL/dU3
    E1    = gamma g - delta / P                      dL/dU1

(outside the output E is zero). The rest are the convolutions' own gradients:

    dx3[q, c]  = sum_{tap, m in group of c} E3[p, m] Wg[m, c, tap] over the p whose tap reads q
               + sum_m E3[p, m] Wp[m, c] / |window of p|           for the one p whose window holds q
    dx1[q, c]  = sum_m E1[p, m] W1[m, c] / |window of p|
    dW[m, k]   = sum_{n, p} E[n, p, m] x[n, p at k]

A3 and A1 need no U either. With G_n[m, k] = sum_p g[n, p, m] x[n, p at k], the weight gradient of one sample,
U3 = sum_k W x gives A3[n, m] = sum_k W[m, k] G_n[m, k] over the representative weights, and A1 the same over the
redundant ones. So the weight-gradient kernel, accumulating sample by sample, yields both

    A    and    sum_n beta_n G_n,        to which    sum_n delta_n mean_p x[n, p at k]

is added afterwards from the forward's statistics. Checked against autograd in float64.

Not GATED, the branches' gradients are given: of the representative branch alone, E3 = g, or, where the layer has
redundant channels, of both side by side: g is [N, HO, WO, 2 CO], E3 in the first CO channels and E1 in the rest.
"""

import triton
import triton.language as tl

from .tiles import dot, dot_computed, inside, pixel_pointers, window_overlap
from .tuning import INPUT_GRAD, LAYER_KEY, WEIGHT_GRAD, autotuned, prune_input_grad, prune_weight_grad


@triton.jit
def _first_tap(phase, K: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr):
    """The first tap that reads input rows of this phase (row % STRIDE), K if none does."""
    first = phase * 0 + K
    for back in tl.static_range(K):
        tap = K - 1 - back
        first = tl.where((phase + PAD - tap * DILATION) % STRIDE == 0, tap, first)
    return first


@triton.jit
def _branch_grad(
    grad_ptr,  # [N, HO, WO, CO], at the first channel of the sum
    ratio_ptr,  # [N, CO] float32, likewise at the sample and the first channel
    shift_ptr,  # [N, CO] float32, likewise
    pointers,  # [BLOCK_PIX], to the first channel of each pixel of g
    valid,  # [BLOCK_PIX]
    co,  # [BLOCK_CO]
    co_mask,  # [BLOCK_CO]
    redundant,  # scalar: E1 instead of E3
    GATED: tl.constexpr,
):
    """E3 or E1 of a block, [BLOCK_PIX, BLOCK_CO], zero where not valid; of one sample if GATED."""
    mask = valid[:, None] & co_mask[None, :]
    e = tl.load(pointers[:, None] + co[None, :], mask=mask, other=0.0)
    if GATED:
        ratio = tl.load(ratio_ptr + co, mask=co_mask, other=0.0)
        shift = tl.load(shift_ptr + co, mask=co_mask, other=0.0)
        beta = 1.0 / (1.0 + ratio)
        factor = tl.where(redundant, ratio * beta, beta)
        shift = tl.where(redundant, -shift, shift)
        gated = e.to(tl.float32) * factor[None, :] + shift[None, :]
        e = tl.where(mask, gated, 0.0).to(grad_ptr.dtype.element_ty)
    return e


@autotuned(INPUT_GRAD, LAYER_KEY, prune_input_grad)
@triton.jit(do_not_specialize=["phase_pixels", "H", "W", "HO", "WO"])
def input_grad(
    grad_ptr,  # g [N, HO, WO, CO], or E3 and E1 [N, HO, WO, 2 CO] if not GATED and C > CR
    gwc_ptr,  # [CO, KH, KW, CG]
    pwc_ptr,  # [CO, CR]
    redundant_ptr,  # [CO, C - CR]; read only if C > CR
    ratio_ptr,  # gamma / beta [N, CO] float32; read only if GATED
    shift_ptr,  # delta / P [N, CO] float32; read only if GATED
    dx_ptr,  # [N, H, W, C]
    phase_pixels,  # ceil(H / STRIDE_H) ceil(W / STRIDE_W)
    H,
    W,
    HO,
    WO,
    C: tl.constexpr,  # CR for the representative branch alone
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
    TAP_STEP_H: tl.constexpr,  # STRIDE / gcd(STRIDE, DILATION): taps this far apart read rows of one phase
    TAP_STEP_W: tl.constexpr,
    PRECISION: tl.constexpr,
    GATED: tl.constexpr,
    HOPPER: tl.constexpr,  # see dot_computed
    BLOCK_PIX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_CO: tl.constexpr,
):
    """Grid: (channel blocks x pixel blocks of a phase x phases x N,), channel blocks fastest: each group's, then those
    of the redundant channels.

    A program takes pixels of one sample, so that the gate is a vector, whose (row, column) are alike modulo the stride,
    so that the taps which reach them are known before the loop and no other tap is visited.
    """
    CG: tl.constexpr = CR // G
    COG: tl.constexpr = CO // G
    CRED: tl.constexpr = C - CR
    GROUP_BLOCKS: tl.constexpr = (CG + BLOCK_C - 1) // BLOCK_C
    C_BLOCKS: tl.constexpr = G * GROUP_BLOCKS + (CRED + BLOCK_C - 1) // BLOCK_C
    CO_BLOCKS: tl.constexpr = (COG + BLOCK_CO - 1) // BLOCK_CO
    GRAD_CO: tl.constexpr = CO if GATED or CRED == 0 else 2 * CO
    CENTRE_H: tl.constexpr = DILATION_H * (KH - 1) // 2 - PAD_H
    CENTRE_W: tl.constexpr = DILATION_W * (KW - 1) // 2 - PAD_W

    pid = tl.program_id(0)
    c_block = pid % C_BLOCKS
    redundant = c_block >= G * GROUP_BLOCKS
    group = tl.where(redundant, 0, c_block // GROUP_BLOCKS)
    within = tl.where(redundant, c_block - G * GROUP_BLOCKS, c_block % GROUP_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = within < tl.where(redundant, CRED, CG)
    channel = tl.where(redundant, CR, group * CG) + within

    pixel_blocks = tl.cdiv(phase_pixels, BLOCK_PIX)
    block = pid // C_BLOCKS
    index = block % pixel_blocks * BLOCK_PIX + tl.arange(0, BLOCK_PIX)
    phase = block // pixel_blocks % (STRIDE_H * STRIDE_W)
    sample = block // (pixel_blocks * STRIDE_H * STRIDE_W)
    phase_h = phase // STRIDE_W
    phase_w = phase % STRIDE_W
    sub_columns = tl.cdiv(W, STRIDE_W)
    sub_row = index // sub_columns
    sub_column = index % sub_columns
    row = sub_row * STRIDE_H + phase_h
    column = sub_column * STRIDE_W + phase_w
    in_range = (row < H) & (column < W)
    co = tl.arange(0, BLOCK_CO)
    ratios = ratio_ptr + sample * CO
    shifts = shift_ptr + sample * CO
    grads = grad_ptr + tl.where(redundant, GRAD_CO - CO, 0)
    acc = tl.zeros((BLOCK_PIX, BLOCK_C), tl.float32)

    # Point-wise: the window that holds the pixel, by a division that rounds down (its operand is kept positive).
    SHIFT_H: tl.constexpr = (CENTRE_H + STRIDE_H - 1) // STRIDE_H if CENTRE_H > 0 else 0
    SHIFT_W: tl.constexpr = (CENTRE_W + STRIDE_W - 1) // STRIDE_W if CENTRE_W > 0 else 0
    out_row = (row - CENTRE_H + SHIFT_H * STRIDE_H) // STRIDE_H - SHIFT_H
    out_column = (column - CENTRE_W + SHIFT_W * STRIDE_W) // STRIDE_W - SHIFT_W
    valid = in_range & inside(out_row, out_column, HO, WO)
    pointers = pixel_pointers(grads, sample, out_row, out_column, HO, WO, GRAD_CO)
    if CRED > 0:
        weights = tl.where(redundant, redundant_ptr, pwc_ptr) + within
        weight_stride = tl.where(redundant, CRED, CR)
        weights += tl.where(redundant, 0, group * CG)
    else:
        weights = pwc_ptr + group * CG + within
        weight_stride = CR
    for co0 in range(0, CO, BLOCK_CO):
        co_mask = co0 + co < CO
        e = _branch_grad(grad_ptr, ratios, shifts, pointers, valid, co0 + co, co_mask, redundant, GATED)
        w = tl.load(
            weights[None, :] + (co0 + co)[:, None] * weight_stride, mask=co_mask[:, None] & c_mask[None, :], other=0.0
        )
        acc = dot_computed(e, w, acc, PRECISION, HOPPER)
    if STRIDE_H * STRIDE_W > 1:
        count = window_overlap(out_row * STRIDE_H + CENTRE_H, H, STRIDE_H)
        count *= window_overlap(out_column * STRIDE_W + CENTRE_W, W, STRIDE_W)
        acc *= (1.0 / tl.maximum(count, 1).to(tl.float32))[:, None]

    first_h = _first_tap(phase_h, KH, STRIDE_H, PAD_H, DILATION_H)
    first_w = _first_tap(phase_w, KW, STRIDE_W, PAD_W, DILATION_W)
    taps_h = tl.cdiv(KH - first_h, TAP_STEP_H)
    taps_w = tl.cdiv(KW - first_w, TAP_STEP_W)
    taps = tl.where(redundant, 0, taps_h * taps_w)
    weights = gwc_ptr + group * (COG * KH * KW * CG) + within
    first_co = group * COG
    for step in range(0, taps * CO_BLOCKS):
        tap = step // CO_BLOCKS
        co0 = step % CO_BLOCKS * BLOCK_CO
        tap_h = first_h + tap // taps_w * TAP_STEP_H
        tap_w = first_w + tap % taps_w * TAP_STEP_W
        out_row = sub_row + (phase_h + PAD_H - tap_h * DILATION_H) // STRIDE_H
        out_column = sub_column + (phase_w + PAD_W - tap_w * DILATION_W) // STRIDE_W
        valid = in_range & inside(out_row, out_column, HO, WO)
        pointers = pixel_pointers(grads, sample, out_row, out_column, HO, WO, GRAD_CO) + first_co
        co_mask = co0 + co < COG
        e = _branch_grad(
            grad_ptr, ratios + first_co, shifts + first_co, pointers, valid, co0 + co, co_mask, redundant, GATED
        )
        rows = (co0 + co)[:, None] * (KH * KW * CG) + (tap_h * KW + tap_w) * CG
        w = tl.load(weights[None, :] + rows, mask=co_mask[:, None] & c_mask[None, :], other=0.0)
        acc = dot_computed(e, w, acc, PRECISION, HOPPER)

    out = pixel_pointers(dx_ptr, sample, row, column, H, W, C)[:, None] + channel[None, :]
    tl.store(out, acc.to(dx_ptr.dtype.element_ty), mask=in_range[:, None] & c_mask[None, :])


@autotuned(WEIGHT_GRAD, (*LAYER_KEY, "BLOCK_C"), prune_weight_grad)
@triton.jit(do_not_specialize=["units", "units_per_split", "slice_pixels", "H", "W", "HO", "WO", "SLICES"])
def weight_grad(
    grad_ptr,  # g [N, HO, WO, CO], or E3 and E1 [N, HO, WO, 2 CO] if not GATED and C > CR
    x_ptr,  # [N, H, W, C], pixels x_stride apart
    pooled_ptr,  # [N, HO, WO, C], see pooling; read only at a stride
    gwc_ptr,  # [CO, KH, KW, CG]; this and the next three are read only if GATED
    pwc_ptr,  # [CO, CR]
    redundant_ptr,  # [CO, C - CR]
    ratio_ptr,  # gamma / beta [N, CO] float32
    partial_ptr,  # [SPLITS, WEIGHTS] float32, WEIGHTS = CO ((C - CR) + CR + KH KW CG)
    inner_ptr,  # parts of A [K_BLOCKS, units, CO] float32; written only if GATED
    units,  # N SLICES
    units_per_split,
    slice_pixels,  # pixels of a slice; SLICES of them cover a sample's output
    H,
    W,
    HO,
    WO,
    x_stride,
    SLICES,
    C: tl.constexpr,  # CR for the representative branch alone
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
    GATED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_PIX: tl.constexpr,
    BLOCK_CO: tl.constexpr,
):
    """Grid: (output-channel blocks of a group x groups x K blocks, splits of the units).

    K blocks are blocks of BLOCK_C input channels: of the redundant weight, of the point-wise one, of each tap. A unit
    is a slice of one sample's pixels. Each split writes its own partial sum, and a later sum in fixed order makes the
    gradient the same on every run.
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
    GRAD_CO: tl.constexpr = CO if GATED or CRED == 0 else 2 * CO

    pid = tl.program_id(0)
    split = tl.program_id(1)
    in_group = pid % CO_BLOCKS * BLOCK_CO + tl.arange(0, BLOCK_CO)
    group = pid // CO_BLOCKS % G
    co = group * COG + in_group
    co_mask = in_group < COG
    k_block = pid // (CO_BLOCKS * G)
    c = tl.arange(0, BLOCK_C)

    # Where the block's channels lie in x, and its weights in their tensor and among all weights.
    redundant = k_block < REDUNDANT_BLOCKS
    pointwise = k_block < REDUNDANT_BLOCKS + POINTWISE_BLOCKS
    tap_block = tl.where(pointwise, 0, k_block - REDUNDANT_BLOCKS - POINTWISE_BLOCKS)
    tap = tap_block // TAP_BLOCKS
    block = tl.where(redundant, k_block, tl.where(pointwise, k_block - REDUNDANT_BLOCKS, tap_block % TAP_BLOCKS))
    within = block * BLOCK_C + c
    c_mask = within < tl.where(redundant, CRED, tl.where(pointwise, CR, CG))
    channel = within + tl.where(redundant, CR, tl.where(pointwise, 0, group * CG))
    weight_stride = tl.where(redundant, CRED, tl.where(pointwise, CR, TAPS * CG))
    element = co[:, None] * weight_stride + tl.where(pointwise, 0, tap * CG) + within[None, :]
    region = tl.where(redundant, 0, tl.where(pointwise, CO * CRED, CO * (CRED + CR)))
    if STRIDE_H * STRIDE_W == 1:
        shift_h = tl.where(pointwise, DILATION_H * (KH - 1) // 2, tap // KW * DILATION_H) - PAD_H
        shift_w = tl.where(pointwise, DILATION_W * (KW - 1) // 2, tap % KW * DILATION_W) - PAD_W
        source_ptr = x_ptr
        height = H
        width = W
        spacing = x_stride
        step_h = 1
        step_w = 1
    else:
        shift_h = tl.where(pointwise, 0, tap // KW * DILATION_H - PAD_H)
        shift_w = tl.where(pointwise, 0, tap % KW * DILATION_W - PAD_W)
        source_ptr = tl.where(pointwise, pooled_ptr, x_ptr)
        height = tl.where(pointwise, HO, H)
        width = tl.where(pointwise, WO, W)
        spacing = tl.where(pointwise, C, x_stride)
        step_h = tl.where(pointwise, 1, STRIDE_H)
        step_w = tl.where(pointwise, 1, STRIDE_W)
    w_mask = co_mask[:, None] & c_mask[None, :]
    if GATED:
        weight_ptr = tl.where(redundant, redundant_ptr, tl.where(pointwise, pwc_ptr, gwc_ptr))

    grads = grad_ptr + tl.where(redundant, GRAD_CO - CO, 0)
    total = tl.zeros((BLOCK_CO, BLOCK_C), tl.float32)
    for unit in range(split * units_per_split, tl.minimum((split + 1) * units_per_split, units)):
        sample = unit // SLICES
        start = unit % SLICES * slice_pixels
        end = tl.minimum(start + slice_pixels, HO * WO)
        one = tl.zeros((BLOCK_CO, BLOCK_C), tl.float32)
        for pixel0 in range(start, end, BLOCK_PIX):
            pixel = pixel0 + tl.arange(0, BLOCK_PIX)
            in_range = pixel < end
            out_row = pixel // WO
            out_column = pixel % WO
            row = out_row * step_h + shift_h
            column = out_column * step_w + shift_w
            pointers = pixel_pointers(source_ptr, sample, row, column, height, width, spacing)
            valid = in_range & inside(row, column, height, width)
            x = tl.load(pointers[:, None] + channel[None, :], mask=valid[:, None] & c_mask[None, :], other=0.0)
            outputs = pixel_pointers(grads, sample, out_row, out_column, HO, WO, GRAD_CO)
            g = tl.load(outputs[:, None] + co[None, :], mask=in_range[:, None] & co_mask[None, :], other=0.0)
            one = dot(tl.trans(g), x, one, PRECISION)
        if GATED:
            w = tl.load(weight_ptr + element, mask=w_mask, other=0.0).to(tl.float32)
            inner = inner_ptr + (k_block * units + unit).to(tl.int64) * CO + co
            tl.store(inner, tl.sum(w * one, 1), mask=co_mask)
            ratio = tl.load(ratio_ptr + sample * CO + co, mask=co_mask, other=0.0)
            beta = 1.0 / (1.0 + ratio)
            one *= tl.where(redundant, ratio * beta, beta)[:, None]
        total += one
    out = partial_ptr + split.to(tl.int64) * WEIGHTS + region + element
    tl.store(out, total, mask=w_mask)
