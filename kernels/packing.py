"""The three weights of a layer as one matrix, K contiguous, as a descriptor's loads of weight tiles want it.

    packed[m] = [ W1[m, :] | Wp[m, channels of other groups] | for each tap: Wg[m, :, tap], + Wp[m, own group] ]

The own group's block of Wp reads what the centre tap reads, so it is added there, in float32, before rounding, and K
shrinks by CG. The other channels of Wp start behind the own group and wrap round. At stride 2 the point-wise
convolutions read the average of four pixels, which four taps also read: W1 and Wp are packed a quarter each, which is
exact, and applied to each of the four.

Groups too narrow for a tile are merged, MERGE neighbours into one: a tap's block then holds the channels of all of
them, zero outside the output channel's own group, and Wp folds over the whole merged group. (Zero times infinity is
NaN, so there an infinite x can reach the other groups' outputs at neighbouring pixels.)

The gate kernel writes this while it reads the weights anyway: no launch of its own, and nothing is cached, so no
in-place update, ``load_state_dict``, ``.to()``, optimizer step, compiled graph or CUDA graph can meet a stale copy.
"""

import triton
import triton.language as tl


@triton.jit
def packed_weight(
    gwc_ptr,  # [CO, 3, 3, CG]
    pwc_ptr,  # [CO, CR]
    redundant_ptr,  # [CO, C - CR]
    co,  # [BLOCK_CO], output channels of one group
    k,  # [BLOCK_K], columns of the packed weight
    mask,  # [BLOCK_CO, BLOCK_K]
    group,
    C: tl.constexpr,
    CR: tl.constexpr,
    G: tl.constexpr,
    MERGE: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Columns ``k`` of the packed weight, [BLOCK_CO, BLOCK_K] float32."""
    CG: tl.constexpr = CR // G
    MERGED: tl.constexpr = CG * MERGE
    CRED: tl.constexpr = C - CR
    POINTWISE: tl.constexpr = CRED + CR - MERGED
    SHARE: tl.constexpr = 1.0 / (STRIDE * STRIDE)
    first = group // MERGE * MERGED  # channel of the merged group
    of_tap = k >= POINTWISE
    tap = tl.where(of_tap, k - POINTWISE, 0) // MERGED
    row = tap // 3
    column = tap % 3
    channel = tl.where(of_tap, first + (k - POINTWISE) % MERGED, (k - CRED + first + MERGED) % CR)
    within = channel - group * CG
    own = of_tap & (within >= 0) & (within < CG)
    folds = of_tap & (row >= 1) & (row <= STRIDE) & (column >= 1) & (column <= STRIDE)
    redundant = k < CRED
    rows = co[:, None]
    w = tl.load(redundant_ptr + rows * CRED + k[None, :], mask=mask & redundant[None, :], other=0.0).to(tl.float32)
    pointwise = (folds | (~redundant & ~of_tap))[None, :]
    w += tl.load(pwc_ptr + rows * CR + channel[None, :], mask=mask & pointwise, other=0.0).to(tl.float32)
    w *= SHARE
    taps = gwc_ptr + rows * (9 * CG) + (tap * CG + within)[None, :]
    return w + tl.load(taps, mask=mask & own[None, :], other=0.0).to(tl.float32)
