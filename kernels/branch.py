"""The representative branch: group-wise k x k and point-wise convolution of the same channels, in one accumulator.

    U3[p, m] = sum_{tap, c in group of m} x3[p at tap, c] Wg[m, c, tap] + sum_c pool(x3)[p, c] Wp[m, c]

pool is the identity at stride 1, else the average over the valid pixels of a stride-sized window at the centre tap.

Backward, with g = dL/dU3:

    dx3[q, c]      = sum_{tap, m in group of c} g[p, m] Wg[m, c, tap]     over the p whose tap reads q
                   + sum_m g[p, m] Wp[m, c] / |window of p|               for the one p whose window holds q
    dWg[m, c, tap] = sum_p g[p, m] x3[p at tap, c]
    dWp[m, c]      = sum_p g[p, m] pool(x3)[p, c]

All three kernels read one packed weight, [CR + KH KW CG, CO]: the rows of Wp, then those of each tap of Wg.
"""

import triton
import triton.language as tl

from .tiles import decode_pixels, dot, inside, load_pooled, pixel_pointers, window_overlap
from .tuning import (
    BRANCH_FORWARD,
    BRANCH_INPUT_GRAD,
    BRANCH_KEY,
    BRANCH_WEIGHT_GRAD,
    autotuned,
    prune_branch,
)


@autotuned(BRANCH_FORWARD, BRANCH_KEY, prune_branch)
@triton.jit(do_not_specialize=["pixels", "H", "W", "HO", "WO"])
def branch_forward(
    x_ptr,  # x3 [N, H, W, CR], pixels x_stride apart
    weight_ptr,  # [CR + KH KW CG, CO]
    u3_ptr,  # [N, HO, WO, CO]
    pixels,  # N HO WO
    H,
    W,
    HO,
    WO,
    x_stride,
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
    """Grid: (pixel blocks x groups x output-channel blocks of a group,), output channels fastest."""
    CG: tl.constexpr = CR // G
    COG: tl.constexpr = CO // G
    CO_BLOCKS: tl.constexpr = (COG + BLOCK_CO - 1) // BLOCK_CO
    C_BLOCKS: tl.constexpr = (CG + BLOCK_C - 1) // BLOCK_C
    CENTRE_H: tl.constexpr = DILATION_H * (KH - 1) // 2 - PAD_H
    CENTRE_W: tl.constexpr = DILATION_W * (KW - 1) // 2 - PAD_W

    pid = tl.program_id(0)
    group = pid // CO_BLOCKS % G
    in_group = pid % CO_BLOCKS * BLOCK_CO + tl.arange(0, BLOCK_CO)
    co = group * COG + in_group
    co_mask = in_group < COG
    pixel = pid // (CO_BLOCKS * G) * BLOCK_PIX + tl.arange(0, BLOCK_PIX)
    in_range = pixel < pixels
    sample, out_row, out_column = decode_pixels(pixel, HO, WO)
    c = tl.arange(0, BLOCK_C)
    weights = weight_ptr + co[None, :]
    acc = tl.zeros((BLOCK_PIX, BLOCK_CO), tl.float32)

    row = out_row * STRIDE_H + CENTRE_H
    column = out_column * STRIDE_W + CENTRE_W
    pointers = pixel_pointers(x_ptr, sample, row, column, H, W, x_stride)
    # Pooled tiles are many loads each: pipelining them would take several times the shared memory.
    STAGES: tl.constexpr = None if STRIDE_H * STRIDE_W == 1 else 1
    for c0 in tl.range(0, CR, BLOCK_C, num_stages=STAGES):
        c_mask = c0 + c < CR
        x = load_pooled(pointers, row, column, in_range, c0 + c, c_mask, H, W, x_stride, STRIDE_H, STRIDE_W)
        w = tl.load(weights + (c0 + c)[:, None] * CO, mask=c_mask[:, None] & co_mask[None, :], other=0.0)
        acc = dot(x, w, acc, PRECISION)

    row = out_row * STRIDE_H - PAD_H
    column = out_column * STRIDE_W - PAD_W
    pointers = pixel_pointers(x_ptr, sample, row, column, H, W, x_stride) + group * CG
    for step in range(0, KH * KW * C_BLOCKS):
        tap = step // C_BLOCKS
        c0 = step % C_BLOCKS * BLOCK_C
        dy = tap // KW * DILATION_H
        dx = tap % KW * DILATION_W
        c_mask = c0 + c < CG
        valid = in_range & inside(row + dy, column + dx, H, W)
        offset = (dy * W + dx).to(tl.int64) * x_stride + c0
        x = tl.load(pointers[:, None] + offset + c[None, :], mask=valid[:, None] & c_mask[None, :], other=0.0)
        rows = CR + tap * CG + c0 + c
        w = tl.load(weights + rows[:, None] * CO, mask=c_mask[:, None] & co_mask[None, :], other=0.0)
        acc = dot(x, w, acc, PRECISION)

    out = u3_ptr + pixel.to(tl.int64)[:, None] * CO + co[None, :]
    tl.store(out, acc.to(u3_ptr.dtype.element_ty), mask=in_range[:, None] & co_mask[None, :])


@triton.jit
def _first_tap(phase, K: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr):
    """The first tap that reads input rows of this phase (row % STRIDE), K if none does."""
    first = phase * 0 + K
    for back in tl.static_range(K):
        tap = K - 1 - back
        first = tl.where((phase + PAD - tap * DILATION) % STRIDE == 0, tap, first)
    return first


@autotuned(BRANCH_INPUT_GRAD, BRANCH_KEY, prune_branch)
@triton.jit(do_not_specialize=["phase_pixels", "H", "W", "HO", "WO"])
def branch_input_grad(
    grad_ptr,  # g [N, HO, WO, CO]
    weight_ptr,  # [CR + KH KW CG, CO]
    dx_ptr,  # [N, H, W, CR]
    phase_pixels,  # N ceil(H / STRIDE_H) ceil(W / STRIDE_W)
    H,
    W,
    HO,
    WO,
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
    BLOCK_PIX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_CO: tl.constexpr,
):
    """Grid: (phases x pixel blocks of a phase x groups x channel blocks of a group,), channels fastest.

    A program takes input pixels whose (row, column) are alike modulo the stride, so that the taps which reach them are
    known before the loop and no other tap is visited.
    """
    CG: tl.constexpr = CR // G
    COG: tl.constexpr = CO // G
    C_BLOCKS: tl.constexpr = (CG + BLOCK_C - 1) // BLOCK_C
    CO_BLOCKS: tl.constexpr = (COG + BLOCK_CO - 1) // BLOCK_CO
    CENTRE_H: tl.constexpr = DILATION_H * (KH - 1) // 2 - PAD_H
    CENTRE_W: tl.constexpr = DILATION_W * (KW - 1) // 2 - PAD_W

    pid = tl.program_id(0)
    group = pid // C_BLOCKS % G
    in_group = pid % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = in_group < CG
    block = pid // (C_BLOCKS * G)
    blocks = tl.cdiv(phase_pixels, BLOCK_PIX)
    phase = block // blocks
    phase_h = phase // STRIDE_W
    phase_w = phase % STRIDE_W
    index = block % blocks * BLOCK_PIX + tl.arange(0, BLOCK_PIX)
    sample, sub_row, sub_column = decode_pixels(index, tl.cdiv(H, STRIDE_H), tl.cdiv(W, STRIDE_W))
    row = sub_row * STRIDE_H + phase_h
    column = sub_column * STRIDE_W + phase_w
    in_range = (index < phase_pixels) & (row < H) & (column < W)
    co = tl.arange(0, BLOCK_CO)
    acc = tl.zeros((BLOCK_PIX, BLOCK_C), tl.float32)

    # Point-wise: the window that holds the pixel, found by a division that rounds down (the operand is kept positive).
    SHIFT_H: tl.constexpr = (CENTRE_H + STRIDE_H - 1) // STRIDE_H if CENTRE_H > 0 else 0
    SHIFT_W: tl.constexpr = (CENTRE_W + STRIDE_W - 1) // STRIDE_W if CENTRE_W > 0 else 0
    out_row = (row - CENTRE_H + SHIFT_H * STRIDE_H) // STRIDE_H - SHIFT_H
    out_column = (column - CENTRE_W + SHIFT_W * STRIDE_W) // STRIDE_W - SHIFT_W
    valid = in_range & inside(out_row, out_column, HO, WO)
    pointers = pixel_pointers(grad_ptr, sample, out_row, out_column, HO, WO, CO)
    rows = weight_ptr + (group * CG + in_group)[:, None] * CO
    for co0 in range(0, CO, BLOCK_CO):
        co_mask = co0 + co < CO
        g = tl.load(pointers[:, None] + (co0 + co)[None, :], mask=valid[:, None] & co_mask[None, :], other=0.0)
        w = tl.load(rows + (co0 + co)[None, :], mask=c_mask[:, None] & co_mask[None, :], other=0.0)
        acc = dot(g, tl.trans(w), acc, PRECISION)
    if STRIDE_H * STRIDE_W > 1:
        count = window_overlap(out_row * STRIDE_H + CENTRE_H, H, STRIDE_H)
        count *= window_overlap(out_column * STRIDE_W + CENTRE_W, W, STRIDE_W)
        acc = acc / tl.maximum(count, 1).to(tl.float32)[:, None]

    first_h = _first_tap(phase_h, KH, STRIDE_H, PAD_H, DILATION_H)
    first_w = _first_tap(phase_w, KW, STRIDE_W, PAD_W, DILATION_W)
    taps_h = tl.cdiv(KH - first_h, TAP_STEP_H)
    taps_w = tl.cdiv(KW - first_w, TAP_STEP_W)
    rows = weight_ptr + (CR + in_group)[:, None] * CO + group * COG
    for step in range(0, taps_h * taps_w * CO_BLOCKS):
        tap = step // CO_BLOCKS
        co0 = step % CO_BLOCKS * BLOCK_CO
        tap_h = first_h + tap // taps_w * TAP_STEP_H
        tap_w = first_w + tap % taps_w * TAP_STEP_W
        out_row = sub_row + (phase_h + PAD_H - tap_h * DILATION_H) // STRIDE_H
        out_column = sub_column + (phase_w + PAD_W - tap_w * DILATION_W) // STRIDE_W
        valid = in_range & inside(out_row, out_column, HO, WO)
        pointers = pixel_pointers(grad_ptr, sample, out_row, out_column, HO, WO, CO) + group * COG
        co_mask = co0 + co < COG
        g = tl.load(pointers[:, None] + (co0 + co)[None, :], mask=valid[:, None] & co_mask[None, :], other=0.0)
        offset = (tap_h * KW + tap_w) * CG * CO + co0
        w = tl.load(rows + offset + co[None, :], mask=c_mask[:, None] & co_mask[None, :], other=0.0)
        acc = dot(g, tl.trans(w), acc, PRECISION)

    out = pixel_pointers(dx_ptr, sample, row, column, H, W, CR)[:, None] + (group * CG + in_group)[None, :]
    tl.store(out, acc.to(dx_ptr.dtype.element_ty), mask=in_range[:, None] & c_mask[None, :])


@autotuned(BRANCH_WEIGHT_GRAD, BRANCH_KEY, prune_branch)
@triton.jit(do_not_specialize=["pixels", "pixels_per_split", "H", "W", "HO", "WO"])
def branch_weight_grad(
    grad_ptr,  # g [N, HO, WO, CO]
    x_ptr,  # x3 [N, H, W, CR], pixels x_stride apart
    partial_ptr,  # [SPLITS, CR + KH KW CG, CO] float32
    pixels,  # N HO WO
    pixels_per_split,
    H,
    W,
    HO,
    WO,
    x_stride,
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
    BLOCK_C: tl.constexpr,
    BLOCK_CO: tl.constexpr,
):
    """Grid: (channel blocks of Wp and of each tap x output-channel blocks x groups, pixel splits).

    Each split writes its own partial sum: a later sum in fixed order makes the gradient the same on every run.
    """
    CG: tl.constexpr = CR // G
    COG: tl.constexpr = CO // G
    CO_BLOCKS: tl.constexpr = (COG + BLOCK_CO - 1) // BLOCK_CO
    C_BLOCKS: tl.constexpr = (CG + BLOCK_C - 1) // BLOCK_C
    POINTWISE_BLOCKS: tl.constexpr = (CR + BLOCK_C - 1) // BLOCK_C
    CENTRE_H: tl.constexpr = DILATION_H * (KH - 1) // 2 - PAD_H
    CENTRE_W: tl.constexpr = DILATION_W * (KW - 1) // 2 - PAD_W

    pid = tl.program_id(0)
    split = tl.program_id(1)
    group = pid // CO_BLOCKS % G
    in_group = pid % CO_BLOCKS * BLOCK_CO + tl.arange(0, BLOCK_CO)
    co = group * COG + in_group
    co_mask = in_group < COG
    k_block = pid // (CO_BLOCKS * G)
    c = tl.arange(0, BLOCK_C)
    pixel_end = tl.minimum((split + 1) * pixels_per_split, pixels)
    acc = tl.zeros((BLOCK_C, BLOCK_CO), tl.float32)

    if k_block < POINTWISE_BLOCKS:
        channel = k_block * BLOCK_C + c
        c_mask = channel < CR
        weight_row = channel
        STAGES: tl.constexpr = None if STRIDE_H * STRIDE_W == 1 else 1
        for pixel0 in tl.range(split * pixels_per_split, pixel_end, BLOCK_PIX, num_stages=STAGES):
            pixel = pixel0 + tl.arange(0, BLOCK_PIX)
            in_range = pixel < pixel_end
            sample, row, column = decode_pixels(pixel, HO, WO)
            row = row * STRIDE_H + CENTRE_H
            column = column * STRIDE_W + CENTRE_W
            pointers = pixel_pointers(x_ptr, sample, row, column, H, W, x_stride)
            x = load_pooled(pointers, row, column, in_range, channel, c_mask, H, W, x_stride, STRIDE_H, STRIDE_W)
            g = tl.load(
                grad_ptr + pixel.to(tl.int64)[:, None] * CO + co[None, :],
                mask=in_range[:, None] & co_mask[None, :],
                other=0.0,
            )
            acc = dot(tl.trans(x), g, acc, PRECISION)
    else:
        tap = (k_block - POINTWISE_BLOCKS) // C_BLOCKS
        channel = (k_block - POINTWISE_BLOCKS) % C_BLOCKS * BLOCK_C + c
        c_mask = channel < CG
        weight_row = CR + tap * CG + channel
        shift_h = tap // KW * DILATION_H - PAD_H
        shift_w = tap % KW * DILATION_W - PAD_W
        for pixel0 in range(split * pixels_per_split, pixel_end, BLOCK_PIX):
            pixel = pixel0 + tl.arange(0, BLOCK_PIX)
            in_range = pixel < pixel_end
            sample, row, column = decode_pixels(pixel, HO, WO)
            row = row * STRIDE_H + shift_h
            column = column * STRIDE_W + shift_w
            valid = in_range & inside(row, column, H, W)
            pointers = pixel_pointers(x_ptr, sample, row, column, H, W, x_stride) + group * CG
            x = tl.load(pointers[:, None] + channel[None, :], mask=valid[:, None] & c_mask[None, :], other=0.0)
            g = tl.load(
                grad_ptr + pixel.to(tl.int64)[:, None] * CO + co[None, :],
                mask=in_range[:, None] & co_mask[None, :],
                other=0.0,
            )
            acc = dot(tl.trans(x), g, acc, PRECISION)

    out = partial_ptr + (split.to(tl.int64) * (CR + KH * KW * CG) + weight_row)[:, None] * CO + co[None, :]
    tl.store(out, acc, mask=c_mask[:, None] & co_mask[None, :])
