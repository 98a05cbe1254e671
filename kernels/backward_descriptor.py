"""The layer's gradients over tensor-map (TMA) descriptors: 3 x 3, stride 1 or 2, padding 1, dilation 1;
for Hopper and data-centre Blackwell. First at stride 1.

The mathematics is :mod:`.backward`'s; what follows is what this form changes. A descriptor's zero fill outside the
tensor is the padding, so there are no masks and no pointers, but nothing can be added to g inside the image only. The
constant in E3 = beta g + delta / P is therefore carried through the convolution separately. With
V[n, tap, c] = sum_{m in group of c} delta[n, m] / P Wg[m, c, tap], input pixel q gets

    dx3[n, q, c] = sum_{tap, m} beta[n, m] g[n, q + 1 - tap, m] Wg[m, c, tap] + ... + constant[n, q, c]
    constant     = sum_{tap with q + 1 - tap inside} V[n, tap, c] + sum_m delta[n, m] / P Wp[m, c]
    dx1[n, q, c] = sum_m gamma[n, m] g[n, q, m] W1[m, c] - sum_m delta[n, m] / P W1[m, c]

so the constant is the total over the taps, less a row of taps in the first and last row of pixels, less a column of
taps in the first and last column, plus the tap counted twice in each corner: nine small planes [9, N, C], which the
kernel that finishes the weights makes. The gate multiplies an operand in registers:

- g, where a tile of pixels spans several samples (7 x 7 and smaller): acc[pixel, c] = (gate[n] g)[pixel, m] W[m, c];
- the weights, where it lies in one sample (56 x 56 to 14 x 14): acc[c, pixel] = (gate[n] W)^T[c, m] g^T[m, pixel]. The
  weight tile is the smaller operand, and g, the second one, goes from shared memory to the tensor cores without a
  register. Float16 has few digits below 6e-5, and weights times a small gate would lose theirs: there the gates of a
  sample come divided by the largest of them, and acc is multiplied by that in the end.

The weights come packed, [ROWS, C], a row for each output channel m of a tap, and the own group's block of Wp is folded
into the centre tap (they read the same pixel): 3 L M products instead of 3.25 at the defaults. Columns c of a merged
group of channels:

    rows [0, CO - COM):       Wp[m, c] for m outside the merged group, from the one behind it on, wrapping round
    rows CO - COM + tap COM:  Wg[m, c, tap] for m in the merged group, 0 outside c's own group; + Wp[m, c] at the centre

and of redundant channels: rows [0, CO): W1[m, c]. MERGE groups are merged where one alone is too narrow for a tensor
core's tile. If all are and still too narrow (MIXED), a tile holds representative and redundant channels, and W1 stands
in the rows of the centre tap.

The weight gradient folds likewise: sum_p g x at the centre tap is both Wg's and Wp's, and computed once, as Wp's.

At stride 2, for even H and W, dx is written as [N, H / 2, 2, W / 2, 2 C], a phase (row and column modulo 2) at a time,
each of them pixels of the size of g. Row 2 i + phase is read from output row i by tap 1 + phase, and in the odd phase
from row i + 1 by tap 0; columns likewise. So the phases have 1, 2, 2 and 4 taps, and each has one, (1 + phase_h,
1 + phase_w), that reads g where the average of the point-wise convolutions does: a quarter of Wp is folded into those
four taps, and what is not folded is a quarter as well. dx1 is the same in all four phases, computed once and written
four times. Of the constant the planes are V itself, tap by tap, with the point-wise part in the same four, and a phase
adds up those of its taps. The weight gradient reads the taps as the forward does, and the averages from a map of them
(:mod:`.pooling`), where nothing folds: the centre tap has products of its own.
"""

import triton
import triton.language as tl

from .tiles import dot, dot_computed, tap_box


@triton.jit
def _plane(constant_ptr, plane, offset, mask, N, C: tl.constexpr):
    return tl.load(constant_ptr + plane * tl.cast(N, tl.int64) * C + offset, mask=mask, other=0.0)


@triton.jit
def _taps_inside(phase, start, SIZE, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """The first of the taps along an axis that some pixel of the tile reads inside g, and how many there are; at
    stride 2 they are two apart."""
    if STRIDE == 1:
        first = 0
        taps = 3
        if BLOCK == 1:
            first = tl.where(start == SIZE - 1, 1, 0)
            taps = tl.where(start == 0, 2, 3) - first
    else:
        first = 1 - phase
        taps = 1 + phase
        if BLOCK == 1:
            skipped = (phase == 1) & (start == SIZE - 1)
            first = tl.where(skipped, 2, first)
            taps = tl.where(skipped, 1, taps)
    return first, taps


@triton.jit
def _plus_constant(
    acc,
    constant_ptr,
    row,  # of the pixels of acc, in a shape that broadcasts
    column,
    offset,  # of the samples and channels of acc in a plane, likewise
    mask,
    h0,  # this and the next are the first pixel
    w0,
    phase_h,
    phase_w,
    has_taps,  # scalar: not of redundant channels alone
    N,
    H,
    W,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    if STRIDE == 2:
        for below in tl.static_range(2):
            for behind in tl.static_range(2):
                if (below <= phase_h) & (behind <= phase_w):
                    plane = (1 - below) * (1 + phase_h) * 3 + (1 - behind) * (1 + phase_w)
                    inside = (row + below < H) & (column + behind < W)
                    acc += tl.where(inside, _plane(constant_ptr, plane, offset, mask, N, C), 0.0)
    else:
        acc += _plane(constant_ptr, 0, offset, mask, N, C)
        if has_taps:
            if h0 == 0:
                acc -= tl.where(row == 0, _plane(constant_ptr, 1, offset, mask, N, C), 0.0)
                if w0 == 0:
                    acc += tl.where((row == 0) & (column == 0), _plane(constant_ptr, 5, offset, mask, N, C), 0.0)
                if w0 + BLOCK_W >= W:
                    acc += tl.where((row == 0) & (column == W - 1), _plane(constant_ptr, 6, offset, mask, N, C), 0.0)
            if h0 + BLOCK_H >= H:
                acc -= tl.where(row == H - 1, _plane(constant_ptr, 2, offset, mask, N, C), 0.0)
                if w0 == 0:
                    corner = (row == H - 1) & (column == 0)
                    acc += tl.where(corner, _plane(constant_ptr, 7, offset, mask, N, C), 0.0)
                if w0 + BLOCK_W >= W:
                    corner = (row == H - 1) & (column == W - 1)
                    acc += tl.where(corner, _plane(constant_ptr, 8, offset, mask, N, C), 0.0)
            if w0 == 0:
                acc -= tl.where(column == 0, _plane(constant_ptr, 3, offset, mask, N, C), 0.0)
            if w0 + BLOCK_W >= W:
                acc -= tl.where(column == W - 1, _plane(constant_ptr, 4, offset, mask, N, C), 0.0)
    return acc


@triton.jit(do_not_specialize=["N", "H", "W", "TILES_H", "TILES_W"])
def input_grad_descriptor(
    grad_desc,  # g [N, H, W, CO], in blocks [BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_K]
    weight_desc,  # packed weights [ROWS, C], in blocks [BLOCK_K, BLOCK_C]
    gate_desc,  # beta, gamma [2, N, CO] float32, in blocks [1, BLOCK_N, BLOCK_K]
    largest_ptr,  # what they have been divided by [2, N] float32; read only if TRANSPOSED in float16
    constant_ptr,  # [9, N, C] float32
    dx_desc,  # [N, H, W, C], in blocks [BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_C]; at stride 2 [N, H, 2, W, 2 C], of one row
    N,
    H,
    W,
    TILES_H,
    TILES_W,
    C: tl.constexpr,
    CR: tl.constexpr,
    CO: tl.constexpr,
    G: tl.constexpr,
    MERGE: tl.constexpr,
    MIXED: tl.constexpr,
    STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # the gate multiplies the weights; BLOCK_N is 1
    HOPPER: tl.constexpr,  # see dot_computed
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (channel blocks x tiles of a sample x sample blocks,), channels fastest.

    At stride 2 representative channels have a block for each phase, those of most taps first.

    A tile of one pixel column or row visits only the taps that are inside the image.
    """
    CM: tl.constexpr = CR // G * MERGE
    COM: tl.constexpr = CO // G * MERGE
    PHASES: tl.constexpr = STRIDE * STRIDE
    PHASED: tl.constexpr = (CR + BLOCK_C - 1) // BLOCK_C  # channel blocks that are computed for each phase
    C_BLOCKS: tl.constexpr = C // BLOCK_C + (PHASES - 1) * PHASED
    TAP_STEPS: tl.constexpr = COM // BLOCK_K
    SAMPLE_PIX: tl.constexpr = BLOCK_H * BLOCK_W
    BLOCK_PIX: tl.constexpr = BLOCK_N * SAMPLE_PIX
    DIVIDED: tl.constexpr = TRANSPOSED and weight_desc.dtype == tl.float16

    pid = tl.program_id(0)
    block = pid % C_BLOCKS
    phase_h = 0
    phase_w = 0
    if STRIDE == 2:
        phase = tl.maximum(PHASES - 1 - block // PHASED, 0)
        block = tl.where(block < PHASES * PHASED, block % PHASED, block - (PHASES - 1) * PHASED)
        phase_h = phase // 2
        phase_w = phase % 2
    c0 = block * BLOCK_C
    tile = pid // C_BLOCKS
    w0 = tile % TILES_W * BLOCK_W
    h0 = tile // TILES_W % TILES_H * BLOCK_H
    n0 = tile // (TILES_W * TILES_H) * BLOCK_N
    redundant = c0 >= CR
    first_co = c0 // CM * COM

    first_h, taps_h = _taps_inside(phase_h, h0, H, BLOCK_H, STRIDE)
    first_w, taps_w = _taps_inside(phase_w, w0, W, BLOCK_W, STRIDE)
    if MIXED:
        point_steps = 0
        first_h = tl.where(redundant, 1 + phase_h, first_h)
        first_w = tl.where(redundant, 1 + phase_w, first_w)
        taps = tl.where(redundant, 1, taps_h * taps_w)
        taps_w = tl.where(redundant, 1, taps_w)
        point_co = 0
    else:
        point_steps = tl.where(redundant, CO // BLOCK_K, (CO - COM) // BLOCK_K)
        taps = tl.where(redundant, 0, taps_h * taps_w)
        point_co = tl.where(redundant, 0, first_co + COM)

    channel = c0 + tl.arange(0, BLOCK_C)
    sample = n0 + tl.arange(0, BLOCK_N)
    branch = tl.where(redundant, 1, 0)
    if DIVIDED:
        largest = tl.load(largest_ptr + branch * N + n0)
        if MIXED:
            largest = tl.where((channel < CR)[:, None], largest, tl.load(largest_ptr + N + n0))
    if TRANSPOSED:
        acc = tl.zeros((BLOCK_C, BLOCK_PIX), tl.float32)
    else:
        acc = tl.zeros((BLOCK_PIX, BLOCK_C), tl.float32)
    for step in range(0, point_steps + taps * TAP_STEPS):
        tap_step = step - point_steps
        point = tap_step < 0
        visited = tap_step // TAP_STEPS
        tap_h = tl.where(point, 1 + phase_h, first_h + visited // taps_w * STRIDE)
        tap_w = tl.where(point, 1 + phase_w, first_w + visited % taps_w * STRIDE)
        within = tap_step - visited * TAP_STEPS
        co0 = tl.where(point, (point_co + step * BLOCK_K) % CO, first_co + within * BLOCK_K)
        if MIXED:
            co0 = within * BLOCK_K
        row = tl.where(point, step, point_steps + (tap_h * 3 + tap_w) * TAP_STEPS + within) * BLOCK_K
        g = grad_desc.load([n0, h0 + (1 + phase_h - tap_h) // STRIDE, w0 + (1 + phase_w - tap_w) // STRIDE, co0])
        w = weight_desc.load([row, c0])
        gate = gate_desc.load([branch, n0, co0])
        if TRANSPOSED:
            gate = gate.reshape(BLOCK_K)[:, None]
            if MIXED:
                gamma = gate_desc.load([1, n0, co0]).reshape(BLOCK_K)[:, None]
                gate = tl.where((channel < CR)[None, :], gate, gamma)
            w = (w.to(tl.float32) * gate).to(w.dtype)
            acc = dot_computed(w.T, g.reshape(BLOCK_PIX, BLOCK_K).T, acc, "ieee", HOPPER)
        else:
            g = g.reshape(BLOCK_N, SAMPLE_PIX, BLOCK_K).to(tl.float32) * gate.reshape(BLOCK_N, 1, BLOCK_K)
            acc = dot_computed(g.reshape(BLOCK_PIX, BLOCK_K).to(w.dtype), w, acc, "ieee", HOPPER)

    if DIVIDED:
        acc *= largest

    # acc, the pixels' places and the constant in shapes that broadcast.
    pixel = tl.arange(0, SAMPLE_PIX)
    row = h0 + pixel // BLOCK_W
    column = w0 + pixel % BLOCK_W
    if TRANSPOSED:
        row = row[None, :]
        column = column[None, :]
        offset = (n0 * C + channel)[:, None]
        mask = offset >= 0
    else:
        acc = acc.reshape(BLOCK_N, SAMPLE_PIX, BLOCK_C)
        row = row[None, :, None]
        column = column[None, :, None]
        offset = sample[:, None, None] * C + channel[None, None, :]
        mask = (sample < N)[:, None, None]
    acc = _plus_constant(
        acc, constant_ptr, row, column, offset, mask, h0, w0, phase_h, phase_w, MIXED or not redundant,
        N, H, W, C, STRIDE, BLOCK_H, BLOCK_W,
    )  # fmt: skip
    dx = acc.to(dx_desc.dtype)
    if TRANSPOSED:
        dx = dx.T
    if STRIDE == 1:
        dx_desc.store([n0, h0, w0, c0], dx.reshape(BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_C))
    else:
        dx = dx.reshape(BLOCK_N, BLOCK_H, 1, BLOCK_W, BLOCK_C)
        dx_desc.store([n0, h0, phase_h, w0, phase_w * C + c0], dx)
        if redundant:
            for other in tl.static_range(1, PHASES):
                dx_desc.store([n0, h0, other // 2, w0, other % 2 * C + c0], dx)


@triton.jit
def _k_tile(
    index,
    group,
    C: tl.constexpr,
    CR: tl.constexpr,
    CM: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(first channel in x, tap, whether redundant, whether point-wise or redundant) of a K tile."""
    REDUNDANT: tl.constexpr = (C - CR) // BLOCK_C
    POINTWISE: tl.constexpr = C // BLOCK_C
    PER_TAP: tl.constexpr = CM // BLOCK_C
    redundant = index < REDUNDANT
    pointwise = index < POINTWISE
    of_taps = tl.where(pointwise, 0, index - POINTWISE)
    tap = of_taps // PER_TAP
    if STRIDE == 1:
        tap = tl.where(tap < 4, tap, tap + 1)  # the centre tap's sums are the point-wise ones
    tap = tl.where(pointwise, 4, tap)
    channel = tl.where(redundant, CR + index * BLOCK_C, (index - REDUNDANT) * BLOCK_C)
    channel = tl.where(pointwise, channel, group * CM + of_taps % PER_TAP * BLOCK_C)
    return channel, tap, redundant, pointwise


@triton.jit
def _gated_sums(
    grad_desc,
    source_desc,  # x or, at a stride, the averages
    inner_ptr,
    ratio_ptr,
    values,  # [BLOCK_CO, BLOCK_C] float32: what a sample's products are multiplied by for its part of A
    k_tile,
    co0,
    tap,
    channel,
    redundant,
    units,
    units_per_split,
    SLICES,
    slice_height,
    W,
    C: tl.constexpr,
    CO: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum over a split's units of their products times the gate, [BLOCK_CO, BLOCK_C]; stores each unit's part of A.

    Units follow each other in one loop, or a 7 x 7 map, one tile, would have nothing to overlap a load with. The loop
    counts instead of dividing its step, which would take almost half of the instructions.
    """
    BLOCK_PIX: tl.constexpr = BLOCK_H * BLOCK_W
    co = co0 + tl.arange(0, BLOCK_CO)
    split = tl.program_id(1)
    one = tl.zeros((BLOCK_CO, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_CO, BLOCK_C), tl.float32)
    unit = split * units_per_split
    units_here = tl.minimum(units_per_split, units - unit)
    sample = unit // SLICES
    piece = unit % SLICES
    h = piece * slice_height
    w = 0
    for _ in range(0, units_here * (slice_height // BLOCK_H) * tl.cdiv(W, BLOCK_W)):
        g = grad_desc.load([sample, h, w, co0]).reshape(BLOCK_PIX, BLOCK_CO)
        x = tap_box(source_desc, sample, h, w, tap // 3, tap % 3, channel, C, STRIDE, BLOCK_PIX, BLOCK_C)
        one = dot(g.T, x, one, "ieee")
        line_ends = w + BLOCK_W >= W
        unit_ends = line_ends & (h + BLOCK_H == (piece + 1) * slice_height)
        if unit_ends:
            part = tl.sum(values * one, 1)
            inner = inner_ptr + (k_tile * units + sample * SLICES + piece).to(tl.int64) * CO + co
            tl.store(inner, part)
            ratio = tl.load(ratio_ptr + sample * CO + co)
            beta = 1.0 / (1.0 + ratio)
            total += one * tl.where(redundant, ratio * beta, beta)[:, None]
            one = tl.zeros((BLOCK_CO, BLOCK_C), tl.float32)
        w = tl.where(line_ends, 0, w + BLOCK_W)
        sample_ends = unit_ends & (piece + 1 == SLICES)
        h = tl.where(sample_ends, 0, tl.where(line_ends, h + BLOCK_H, h))
        piece = tl.where(sample_ends, 0, tl.where(unit_ends, piece + 1, piece))
        sample = tl.where(sample_ends, sample + 1, sample)
    return total


@triton.jit(do_not_specialize=["units", "units_per_split", "SLICES", "slice_height", "W"])
def weight_grad_descriptor(
    grad_desc,  # g [N, HO, WO, CO], in blocks [1, BLOCK_H, BLOCK_W, BLOCK_CO]
    x_desc,  # [N, H, W, C], in blocks [1, BLOCK_H, BLOCK_W, BLOCK_C]; at stride 2 see tap_box
    pooled_desc,  # [N, HO, WO, C], likewise as at stride 1; read only at stride 2
    gwc_ptr,  # [CO, 3, 3, CG]
    pwc_ptr,  # [CO, CR]
    redundant_ptr,  # [CO, C - CR]
    ratio_ptr,  # gamma / beta [N, CO] float32
    partial_ptr,  # [SPLITS, CO (C + TAPS CG)] float32: redundant, point-wise, taps, at stride 1 but the centre one
    inner_ptr,  # parts of A [K_TILES, units, CO] float32
    units,  # N SLICES
    units_per_split,
    SLICES,  # of a sample
    slice_height,  # rows of a slice, a multiple of BLOCK_H; SLICES of them cover a sample
    W,  # of g
    C: tl.constexpr,
    CR: tl.constexpr,
    CO: tl.constexpr,
    G: tl.constexpr,
    MERGE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (output-channel blocks x K tiles, splits of the units).

    K tiles are BLOCK_C input channels: redundant ones, point-wise ones, and for each tap those of the merged group of
    the outputs; of the latter only each output's own group is stored. A unit is a slice of one sample's rows.
    """
    CG: tl.constexpr = CR // G
    CM: tl.constexpr = CG * MERGE
    COM: tl.constexpr = CO // G * MERGE
    CO_BLOCKS: tl.constexpr = CO // BLOCK_CO
    TAPS: tl.constexpr = 8 if STRIDE == 1 else 9
    co0 = tl.program_id(0) % CO_BLOCKS * BLOCK_CO
    co = co0 + tl.arange(0, BLOCK_CO)
    k_tile = tl.program_id(0) // CO_BLOCKS
    channel, tap, redundant, pointwise = _k_tile(k_tile, co0 // COM, C, CR, CM, STRIDE, BLOCK_C)
    c = channel + tl.arange(0, BLOCK_C)
    own = (co // (CO // G))[:, None] == (c // CG)[None, :]

    # The tile's place in its weight and in the sums.
    stored = own | pointwise
    column = tl.where(redundant, c - CR, tl.where(pointwise, c, c % CG))
    width = tl.where(redundant, C - CR, tl.where(pointwise, CR, 9 * CG))
    weights = tl.where(redundant, redundant_ptr, tl.where(pointwise, pwc_ptr, gwc_ptr + tap * CG)) + co * width
    # In registers: a 7 x 7 map is one step. At stride 1 the centre tap's products are the point-wise ones.
    values = tl.load(weights[:, None] + column[None, :], mask=stored, other=0.0).to(tl.float32)
    if STRIDE == 1:
        centre = gwc_ptr + 4 * CG + co * (9 * CG)
        both = own & pointwise & (redundant == 0)
        values += tl.load(centre[:, None] + (c % CG)[None, :], mask=both, other=0.0).to(tl.float32)

    if STRIDE == 1:
        total = _gated_sums(
            grad_desc, x_desc, inner_ptr, ratio_ptr, values, k_tile, co0, tap, channel, redundant,
            units, units_per_split, SLICES, slice_height, W, C, CO, 1, BLOCK_H, BLOCK_W, BLOCK_CO, BLOCK_C,
        )  # fmt: skip
    else:
        if pointwise:
            total = _gated_sums(
                grad_desc, pooled_desc, inner_ptr, ratio_ptr, values, k_tile, co0, tap, channel, redundant,
                units, units_per_split, SLICES, slice_height, W, C, CO, 1, BLOCK_H, BLOCK_W, BLOCK_CO, BLOCK_C,
            )  # fmt: skip
        else:
            total = _gated_sums(
                grad_desc, x_desc, inner_ptr, ratio_ptr, values, k_tile, co0, tap, channel, redundant,
                units, units_per_split, SLICES, slice_height, W, C, CO, 2, BLOCK_H, BLOCK_W, BLOCK_CO, BLOCK_C,
            )  # fmt: skip
    stored_tap = tap
    if STRIDE == 1:
        stored_tap = tl.where(tap < 4, tap, tap - 1)
    region = tl.where(redundant, 0, tl.where(pointwise, CO * (C - CR), CO * C + stored_tap * CG))
    width = tl.where(pointwise, width, TAPS * CG)
    partial = partial_ptr + tl.program_id(1).to(tl.int64) * (CO * (C + TAPS * CG)) + region + co * width
    tl.store(partial[:, None] + column[None, :], total, mask=stored)
