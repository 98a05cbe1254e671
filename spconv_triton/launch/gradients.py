"""Input and weight gradients, of the gated layer and of the representative branch alone."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
from einops import rearrange
from torch import Tensor
from torch.library import wrap_triton

from ..geometry import Geometry
from ..kernels.backward import input_grad, weight_grad
from ..kernels.tuning import weight_grad_channels
from .common import TARGET_PROGRAMS, channels_last, empty_channels_last, layer_constants, pixel_major

KERNELS = (weight_grad, input_grad)

Weights = tuple[Tensor, Tensor, Tensor | None]
"""Group-wise, point-wise and redundant weight; the branch alone has no redundant one."""


def layer_input_grad(
    grad: Tensor, x: Tensor, weights: Weights, ratio: Tensor | None, shift: Tensor | None, geometry: Geometry
) -> Tensor:
    """dL/dx, [N, C, H, W], channels_last; ``ratio`` and ``shift`` are None for the branch without a gate."""
    weight_gwc, weight_pwc, weight_redundant = weights
    batch, channels, height, width = x.shape
    representative = weight_pwc.shape[1]
    stride_h, stride_w = geometry.stride
    dx = empty_channels_last(x, channels, height, width)
    if dx.numel() == 0:
        return dx
    grad = channels_last(grad)
    phase_pixels = triton.cdiv(height, stride_h) * triton.cdiv(width, stride_w)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        blocks = geometry.groups * triton.cdiv(representative // geometry.groups, meta["BLOCK_C"])
        blocks += triton.cdiv(channels - representative, meta["BLOCK_C"])
        return (blocks * triton.cdiv(phase_pixels, meta["BLOCK_PIX"]) * stride_h * stride_w * batch,)

    wrap_triton(input_grad)[grid](
        grad,
        channels_last(weight_gwc),
        weight_pwc.contiguous(),
        weight_pwc if weight_redundant is None else weight_redundant.contiguous(),
        grad if ratio is None else ratio,
        grad if shift is None else shift,
        dx,
        phase_pixels,
        height,
        width,
        grad.shape[2],
        grad.shape[3],
        C=channels,
        TAP_STEP_H=stride_h // gcd(stride_h, geometry.dilation[0]),
        TAP_STEP_W=stride_w // gcd(stride_w, geometry.dilation[1]),
        GATED=ratio is not None,
        **layer_constants(x, weight_gwc, weight_pwc, geometry),
    )
    return dx


def layer_weight_grad(
    grad: Tensor, x: Tensor, weights: Weights, ratio: Tensor | None, geometry: Geometry
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Weight gradients short of the gate's own term, flat, in the order redundant, point-wise, group-wise; and A1, A3.

    Both in float32; A1 and A3 are [N, M], or empty where ``ratio`` is None.
    """
    weight_gwc, weight_pwc, weight_redundant = weights
    batch, channels, height, width = x.shape
    outputs, representative = weight_pwc.shape[:2]
    count = sum(w.numel() for w in weights if w is not None)
    pixels = grad.shape[2] * grad.shape[3]
    if batch == 0:
        none = x.new_zeros((batch, outputs), dtype=torch.float32)
        return x.new_zeros(count, dtype=torch.float32), (none, none)
    grad, (x, spacing) = channels_last(grad), pixel_major(x)
    block = weight_grad_channels(representative // geometry.groups)
    redundant_blocks = triton.cdiv(channels - representative, block)
    k_blocks = redundant_blocks + triton.cdiv(representative, block)
    k_blocks += geometry.taps * triton.cdiv(representative // geometry.groups, block)
    # Enough programs to fill a GPU, of at least 1024 pixels each; a slice lies within one sample, for the gate's sake.
    tiles = k_blocks * triton.cdiv(outputs, 64)
    splits = max(1, min(triton.cdiv(TARGET_PROGRAMS, tiles), triton.cdiv(batch * pixels, 1024)))
    slices = triton.cdiv(splits, batch)
    units = batch * slices
    partial = x.new_empty((splits, count), dtype=torch.float32)
    inner = x.new_empty((k_blocks, batch, slices, outputs) if ratio is not None else 0, dtype=torch.float32)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return k_blocks * geometry.groups * triton.cdiv(outputs // geometry.groups, meta["BLOCK_CO"]), splits

    wrap_triton(weight_grad)[grid](
        grad,
        x,
        channels_last(weight_gwc),
        weight_pwc.contiguous(),
        weight_pwc if weight_redundant is None else weight_redundant.contiguous(),
        grad if ratio is None else ratio,
        partial,
        inner,
        units,
        triton.cdiv(units, splits),
        triton.cdiv(pixels, slices),
        height,
        width,
        grad.shape[2],
        grad.shape[3],
        spacing,
        slices,
        C=channels,
        GATED=ratio is not None,
        BLOCK_C=block,
        **layer_constants(x, weight_gwc, weight_pwc, geometry),
    )
    if ratio is None:
        return partial.sum(0), (inner, inner)
    a1, a3 = (part.sum((0, 2)) for part in inner.split((redundant_blocks, k_blocks - redundant_blocks)))
    return partial.sum(0), (a1, a3)


def unpack_weights(flat: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Group-wise, point-wise and redundant weight from their flat concatenation, in the weights' dtypes and strides."""
    weight_gwc, weight_pwc, weight_redundant = weights
    redundant = 0 if weight_redundant is None else weight_redundant.numel()
    parts = flat.split((redundant, weight_pwc.numel(), weight_gwc.numel()))
    outputs, _, kh, kw = weight_gwc.shape
    d_gwc, d_pwc = torch.empty_like(weight_gwc), torch.empty_like(weight_pwc)
    d_redundant = flat.new_empty(0) if weight_redundant is None else torch.empty_like(weight_redundant)
    d_gwc.copy_(rearrange(parts[2], "(m kh kw c) -> m c kh kw", m=outputs, kh=kh, kw=kw))
    d_pwc.copy_(parts[1].view(weight_pwc.shape))
    if weight_redundant is not None:
        d_redundant.copy_(parts[0].view(weight_redundant.shape))
    return d_gwc, d_pwc, d_redundant


def spconv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    branch_bias: Tensor | None,
    ratio: Tensor,
    tap_mean: Tensor,
    pool_mean: Tensor,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (channels_last), the three weights, and the branch bias ([0, M] where there is none).

    Args:
        grad: dL/dY, [N, M, H_out, W_out].
        ratio, tap_mean, pool_mean: as :func:`spconv_triton.launch.spconv2d` returned them.
    """
    weights = (weight_gwc, weight_pwc, weight_redundant)
    total, inner = layer_weight_grad(grad, x, weights, ratio, geometry)
    beta = 1 / (1 + ratio)
    gamma = ratio * beta
    a1, a3 = inner
    if branch_bias is not None:
        grad_sum = grad.sum((2, 3), dtype=torch.float32)
        a3, a1 = a3 + branch_bias[0] * grad_sum, a1 + branch_bias[1] * grad_sum
    delta = beta * gamma * (a3 - a1)
    if branch_bias is not None:
        d_branch_bias = torch.stack([beta * grad_sum + delta, gamma * grad_sum - delta]).sum(1).to(branch_bias.dtype)
    else:
        d_branch_bias = grad.new_zeros((0, grad.shape[1]))
    representative = weight_pwc.shape[1]
    pool3, pool1 = pool_mean.float().split((representative, weight_redundant.shape[1]), dim=1)
    by_group = rearrange(delta, "n (g m) -> g m n", g=geometry.groups)
    taps = rearrange(tap_mean.float(), "n t (g c) -> g n (t c)", g=geometry.groups)
    rank_n = (-(delta.T @ pool1), delta.T @ pool3, torch.bmm(by_group, taps))
    total = total + torch.cat([term.reshape(-1) for term in rank_n])
    d_gwc, d_pwc, d_redundant = unpack_weights(total, weights)
    pixels = max(1, grad.shape[2] * grad.shape[3])
    dx = layer_input_grad(grad, x, weights, ratio, delta / pixels, geometry)
    return dx, d_gwc, d_pwc, d_redundant, d_branch_bias
