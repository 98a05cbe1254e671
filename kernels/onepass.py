"""The whole layer in one convolution kernel, once the gate is known: neither U3 nor U1 is ever in memory.

    Y = beta (GWC(x3) + Wp x3) + gamma (W1 x1) + offset
      = scale (ratio (W1 x1) + Wp x3 + GWC(x3)) + offset,        ratio = gamma / beta, scale = beta

One accumulator takes the redundant channels, is multiplied by ratio, takes the representative channels, and is
multiplied by scale. This is the portable form: flat pixels and plain pointers, for any GPU and any legal shape.
"""

import triton
import triton.language as tl

from .accumulate import add_pointwise, add_taps, output_block
from .epilogue import activate
from .tuning import FORWARD, LAYER_KEY, autotuned, prune_forward


@triton.jit
def scale_by_sample(acc, factor_ptr, sample, first, last, co, co_mask, CO: tl.constexpr):
    """Multiply each row of acc [BLOCK_PIX, BLOCK_CO] by its sample's row of factor [N, CO].

    A block of pixels holds the samples ``first`` to ``last``, mostly one or two.
    """
    for n in range(first, last + 1):
        factor = tl.load(factor_ptr + n * CO + co, mask=co_mask, other=0.0)
        acc *= tl.where((sample == n)[:, None], factor[None, :], 1.0)
    return acc


@autotuned(FORWARD, LAYER_KEY, prune_forward)
@triton.jit(do_not_specialize=["pixels", "H", "W", "HO", "WO"])
def onepass_forward(
    x_ptr,  # [N, H, W, C], pixels x_stride apart
    gwc_ptr,  # [CO, KH, KW, CG]
    pwc_ptr,  # [CO, CR]
    redundant_ptr,  # [CO, C - CR]
    ratio_ptr,  # [N, CO] float32
    scale_ptr,  # [N, CO] float32
    offset_ptr,  # [N, CO] float32
    residual_ptr,  # [N, HO, WO, CO]; read only if RESIDUAL
    y_ptr,  # [N, HO, WO, CO]
    pixels,  # N HO WO
    H,
    W,
    HO,
    WO,
    x_stride,
    C: tl.constexpr,
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
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,  # see epilogue
    BLOCK_PIX: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (pixel blocks x groups x output-channel blocks of a group,), output channels fastest."""
    CG: tl.constexpr = CR // G
    CENTRE_H: tl.constexpr = DILATION_H * (KH - 1) // 2 - PAD_H
    CENTRE_W: tl.constexpr = DILATION_W * (KW - 1) // 2 - PAD_W

    group, co, co_mask, pixel, in_range, sample, row, column = output_block(pixels, HO, WO, CO, G, BLOCK_PIX, BLOCK_CO)
    pixel0 = tl.program_id(0) // (G * tl.cdiv(CO // G, BLOCK_CO)) * BLOCK_PIX
    first = pixel0 // (HO * WO)
    last = tl.minimum(pixel0 + BLOCK_PIX - 1, pixels - 1) // (HO * WO)

    acc = tl.zeros((BLOCK_PIX, BLOCK_CO), tl.float32)
    acc = add_pointwise(
        acc, x_ptr + CR, redundant_ptr, sample, row, column, in_range, co, co_mask, H, W, x_stride,
        C - CR, STRIDE_H, STRIDE_W, CENTRE_H, CENTRE_W, BLOCK_C, PRECISION,
    )  # fmt: skip
    acc = scale_by_sample(acc, ratio_ptr, sample, first, last, co, co_mask, CO)
    acc = add_pointwise(
        acc, x_ptr, pwc_ptr, sample, row, column, in_range, co, co_mask, H, W, x_stride,
        CR, STRIDE_H, STRIDE_W, CENTRE_H, CENTRE_W, BLOCK_C, PRECISION,
    )  # fmt: skip
    acc = add_taps(
        acc, x_ptr + group * CG, gwc_ptr, sample, row, column, in_range, co, co_mask, H, W, x_stride,
        CG, KH, KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, BLOCK_C, PRECISION,
    )  # fmt: skip

    for n in range(first, last + 1):
        scale = tl.load(scale_ptr + n * CO + co, mask=co_mask, other=0.0)
        offset = tl.load(offset_ptr + n * CO + co, mask=co_mask, other=0.0)
        acc = tl.where((sample == n)[:, None], acc * scale[None, :] + offset[None, :], acc)
    mask = in_range[:, None] & co_mask[None, :]
    out = pixel.to(tl.int64)[:, None] * CO + co[None, :]
    if RESIDUAL:
        acc += tl.load(residual_ptr + out, mask=mask, other=0.0).to(tl.float32)
    acc = activate(acc, ACTIVATION)
    tl.store(y_ptr + out, acc.to(y_ptr.dtype.element_ty), mask=mask)
