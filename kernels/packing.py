"""The three weights of a layer as one matrix, K contiguous, as a descriptor's loads of weight tiles want it.

    packed[m] = [ Wp[m, channels of other groups] | for each tap: Wg[m, :, tap], + Wp[m, own group] | W1[m, :] ]

W1 comes last, for what is multiplied before needs no gate (see :mod:`.descriptor`).

The own group's block of Wp reads what the centre tap reads, so it is added there, in float32, before rounding, and K
shrinks by CG. The other channels of Wp start behind the own group and wrap round. At stride 2 the point-wise
convolutions read the average of four pixels, which four taps also read: W1 and Wp are packed a quarter each, which is
exact, and applied to each of the four.

Groups too narrow for a tile are merged, MERGE neighbours into one: a tap's block then holds the channels of all of
them, zero outside the output channel's own group, and Wp folds over the whole merged group. (Zero times infinity is
NaN, so there an infinite x can reach the other groups' outputs at neighbouring pixels.)

Programs of the statistics' launch write this, beside those that read x: no launch of its own, and nothing is cached, so
no in-place update, ``load_state_dict``, ``.to()``, optimizer step, compiled graph or CUDA graph can meet a stale copy.
"""

import triton
import triton.language as tl

from .arithmetic import cdiv

BLOCK_ROWS = tl.constexpr(16)
BLOCK_COLUMNS = tl.constexpr(128)
"""Of a program that packs."""


def packing_programs(outputs: int, columns: int) -> int:
    """How many programs :func:`pack_weights` takes."""
    return cdiv(outputs, BLOCK_ROWS.value) * cdiv(columns, BLOCK_COLUMNS.value)


@triton.jit
def pack_weights(
    program,
    gwc_ptr,  # [CO, 3, 3, CG]
    pwc_ptr,  # [CO, CR]
    redundant_ptr,  # [CO, C - CR]
    packed_ptr,  # [CO, (CR - CG') + 9 CG' + (C - CR)], CG' = MERGE CG
    C: tl.constexpr,
    CR: tl.constexpr,
    CO: tl.constexpr,
    G: tl.constexpr,
    MERGE: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """A block of the packed weight, which has as many as BLOCK_ROWS and BLOCK_COLUMNS make."""
    CG: tl.constexpr = CR // G
    COG: tl.constexpr = CO // G
    MERGED: tl.constexpr = CG * MERGE
    CRED: tl.constexpr = C - CR
    POINTWISE: tl.constexpr = CR - MERGED
    REDUNDANT: tl.constexpr = POINTWISE + 9 * MERGED
    COLUMNS: tl.constexpr = REDUNDANT + CRED
    SHARE: tl.constexpr = 1.0 / (STRIDE * STRIDE)
    ROW_BLOCKS: tl.constexpr = (CO + BLOCK_ROWS - 1) // BLOCK_ROWS
    co = (program % ROW_BLOCKS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    k = (program // ROW_BLOCKS * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    mask = (co < CO) & (k < COLUMNS)
    group = co // COG
    first = group // MERGE * MERGED  # channel of the merged group
    redundant = k >= REDUNDANT
    of_tap = (k >= POINTWISE) & ~redundant
    tap = tl.where(of_tap, k - POINTWISE, 0) // MERGED
    row = tap // 3
    column = tap % 3
    channel = tl.where(of_tap, first + (k - POINTWISE) % MERGED, (k + first + MERGED) % CR)
    within = channel - group * CG
    own = of_tap & (within >= 0) & (within < CG)
    folds = of_tap & (row >= 1) & (row <= STRIDE) & (column >= 1) & (column <= STRIDE)
    w = tl.load(redundant_ptr + co * CRED + k - REDUNDANT, mask=mask & redundant, other=0.0).to(tl.float32)
    pointwise = folds | (k < POINTWISE)
    w += tl.load(pwc_ptr + co * CR + channel, mask=mask & pointwise, other=0.0).to(tl.float32)
    w *= SHARE
    w += tl.load(gwc_ptr + co * (9 * CG) + tap * CG + within, mask=mask & own, other=0.0).to(tl.float32)
    tl.store(packed_ptr + co * COLUMNS + k, w.to(packed_ptr.dtype.element_ty), mask=mask)
