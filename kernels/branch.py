"""The representative branch: group-wise k x k and point-wise convolution of the same channels, in one accumulator.

    U3[p, m] = sum_{tap, c in group of m} x3[p at tap, c] Wg[m, c, tap] + sum_c pool(x3)[p, c] Wp[m, c]

pool is the identity at stride 1, else the average over the valid pixels of a stride-sized window at the centre tap.
The gradients are those of :mod:`.backward`, without a gate.
"""

import triton
import triton.language as tl

from .accumulate import add_pointwise, add_taps, output_block
from .tuning import BRANCH_KEY, FORWARD, autotuned, prune_forward


@autotuned(FORWARD, BRANCH_KEY, prune_forward)
@triton.jit(do_not_specialize=["pixels", "H", "W", "HO", "WO"])
def branch_forward(
    x_ptr,  # x3 [N, H, W, CR], pixels x_stride apart
    gwc_ptr,  # [CO, KH, KW, CG]
    pwc_ptr,  # [CO, CR]
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
    CENTRE_H: tl.constexpr = DILATION_H * (KH - 1) // 2 - PAD_H
    CENTRE_W: tl.constexpr = DILATION_W * (KW - 1) // 2 - PAD_W

    group, co, co_mask, pixel, in_range, sample, row, column = output_block(pixels, HO, WO, CO, G, BLOCK_PIX, BLOCK_CO)

    acc = tl.zeros((BLOCK_PIX, BLOCK_CO), tl.float32)
    acc = add_pointwise(
        acc, x_ptr, pwc_ptr, sample, row, column, in_range, co, co_mask, H, W, x_stride,
        CR, STRIDE_H, STRIDE_W, CENTRE_H, CENTRE_W, BLOCK_C, PRECISION,
    )  # fmt: skip
    acc = add_taps(
        acc, x_ptr + group * CG, gwc_ptr, sample, row, column, in_range, co, co_mask, H, W, x_stride,
        CG, KH, KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, BLOCK_C, PRECISION,
    )  # fmt: skip

    out = u3_ptr + pixel.to(tl.int64)[:, None] * CO + co[None, :]
    tl.store(out, acc.to(u3_ptr.dtype.element_ty), mask=in_range[:, None] & co_mask[None, :])
