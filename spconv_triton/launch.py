"""From tensors to kernels: allocation, strides, grids. The only importer of the kernels.

Every function takes and returns plain tensors; differentiation and registration are :mod:`spconv_triton.ops`'s.
Activations are channels_last, and so is the group-wise weight; what comes in another layout is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

import torch
import triton
from einops import rearrange
from torch import Tensor
from torch.library import wrap_triton

from .geometry import Geometry
from .kernels.backward import input_grad, weight_grad
from .kernels.branch import branch_forward
from .kernels.fusion import fusion_blend, fusion_blend_grad, fusion_statistics
from .kernels.gate import gate_planes
from .kernels.onepass import onepass_forward
from .kernels.statistics import window_statistics
from .kernels.tuning import weight_grad_channels

BRANCH_FORWARD_KERNELS = (branch_forward,)
FUSION_FORWARD_KERNELS = (fusion_statistics, fusion_blend)
FUSION_BACKWARD_KERNELS = (fusion_statistics, fusion_blend_grad)
LAYER_FORWARD_KERNELS = (window_statistics, gate_planes, onepass_forward)
LAYER_BACKWARD_KERNELS = (weight_grad, input_grad)

MAX_PIXELS = 2**31 - 1

TARGET_PROGRAMS = 512
"""How many programs a reduction is split into at least: a few for each of a large GPU's 80 to 150 processors. Fixed, so
that the order of summation, and with it every bit of the result, does not depend on the device."""

Grid = Callable[[dict[str, Any]], tuple[int, ...]]


def representative_branch(x3: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry) -> Tensor:
    """U3, [N, M, H_out, W_out], channels_last.

    Args:
        x3: [N, alpha L, H, W]; a channel slice of a channels_last tensor is read in place.
        weight_gwc: [M, alpha L / G, k, k].
        weight_pwc: [M, alpha L, 1, 1].
    """
    x3, spacing = pixel_major(x3)
    u3 = empty_output(x3, weight_gwc, geometry)
    if u3.numel() == 0:
        return u3
    pixels, *sizes = pixel_arguments(x3, u3)
    wrap_triton(branch_forward)[_forward_grid(pixels, weight_gwc, geometry)](
        x3,
        channels_last(weight_gwc),
        weight_pwc.contiguous(),
        u3,
        pixels,
        *sizes,
        spacing,
        **_layer_constants(x3, weight_gwc, weight_pwc, geometry),
    )
    return u3


def representative_branch_backward(
    grad: Tensor, x3: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x3 (channels_last), weight_gwc and weight_pwc.

    Args:
        grad: dL/dU3, [N, M, H_out, W_out].
        x3, weight_gwc, weight_pwc: as in :func:`representative_branch`.
    """
    weights = (weight_gwc, weight_pwc, None)
    dx3 = _input_grad(grad, x3, weights, None, None, geometry)
    d_gwc, d_pwc, _ = unpack_weights(_weight_grad(grad, x3, weights, None, geometry)[0], weights)
    return dx3, d_gwc, d_pwc


def spconv2d(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    geometry: Geometry,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The layer in three launches: statistics, gate, convolution.

    Args:
        x: [N, L, H, W]; a channel slice of a channels_last tensor is read in place.
        weight_gwc, weight_pwc, weight_redundant: [M, alpha L / G, k, k], [M, alpha L, 1, 1], [M, L - alpha L, 1, 1].
        bias: [M]; branch_bias: [2, M].
        residual: [N, M, H_out, W_out], added to the output.
        relu: clamps the output at 0, after the residual.

    Returns:
        Y [N, M, H_out, W_out], channels_last, and what the backward needs: gamma / beta [N, M] float32, the mean of
        what each tap reads [N, k k, alpha L], and of what the point-wise convolutions read [N, L], in the dtype of x.
    """
    x, spacing = pixel_major(x)
    y = empty_output(x, weight_gwc, geometry)
    batch, channels = x.shape[:2]
    outputs, representative = weight_pwc.shape[:2]
    ratio, scale, offset = (x.new_empty((batch, outputs), dtype=torch.float32) for _ in range(3))
    tap_mean = x.new_empty((batch, geometry.taps, representative))
    pool_mean = x.new_empty((batch, channels))
    if y.numel() == 0:
        return y, ratio, tap_mean, pool_mean
    pixels, *sizes = pixel_arguments(x, y)
    gwc, pwc, redundant = channels_last(weight_gwc), weight_pwc.contiguous(), weight_redundant.contiguous()
    partial, pool_row = _window_statistics(x, spacing, y, geometry)

    def gate_grid(meta: dict[str, Any]) -> tuple[int]:
        per_group = triton.cdiv(outputs // geometry.groups, meta["BLOCK_CO"])
        return (per_group * geometry.groups * triton.cdiv(batch, meta["BLOCK_N"]),)

    wrap_triton(gate_planes)[gate_grid](
        partial,
        gwc,
        pwc,
        redundant,
        ratio if bias is None else bias,
        ratio if branch_bias is None else branch_bias.contiguous(),
        ratio,
        scale,
        offset,
        tap_mean,
        pool_mean,
        batch,
        y.shape[2] * y.shape[3],
        C=channels,
        CR=representative,
        CO=outputs,
        G=geometry.groups,
        TAPS=geometry.taps,
        ROWS=partial.shape[2],
        POOL_ROW=pool_row,
        SPLITS=partial.shape[0],
        BIAS=bias is not None,
        BRANCH_BIAS=branch_bias is not None,
    )
    wrap_triton(onepass_forward)[_forward_grid(pixels, weight_gwc, geometry)](
        x,
        gwc,
        pwc,
        redundant,
        ratio,
        scale,
        offset,
        y if residual is None else channels_last(residual),
        y,
        pixels,
        *sizes,
        spacing,
        C=channels,
        RESIDUAL=residual is not None,
        RELU=relu,
        **_layer_constants(x, weight_gwc, weight_pwc, geometry),
    )
    return y, ratio, tap_mean, pool_mean


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
        ratio, tap_mean, pool_mean: as :func:`spconv2d` returned them.
    """
    weights = (weight_gwc, weight_pwc, weight_redundant)
    total, inner = _weight_grad(grad, x, weights, ratio, geometry)
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
    dx = _input_grad(grad, x, weights, ratio, delta / pixels, geometry)
    return dx, d_gwc, d_pwc, d_redundant, d_branch_bias


def _window_statistics(x: Tensor, spacing: int, y: Tensor, geometry: Geometry) -> tuple[Tensor, int]:
    """Sums over what the taps read, [splits, N, rows, L] float32, and the row of what the point-wise ones read."""
    batch, channels, height, width = x.shape
    kh, kw = geometry.kernel_size
    pooled = geometry.stride != (1, 1)
    rows = geometry.taps + (2 if pooled else 0)
    pool_row = geometry.taps if pooled else (kh // 2) * kw + kw // 2
    blocks = batch * triton.cdiv(channels, 64)
    splits = max(1, min(triton.cdiv(TARGET_PROGRAMS, blocks), triton.cdiv(height * width, 256), 16))
    partial = x.new_empty((splits, batch, rows, channels), dtype=torch.float32)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return batch * triton.cdiv(channels, meta["BLOCK_C"]), splits

    wrap_triton(window_statistics)[grid](
        x,
        partial,
        batch,
        height,
        width,
        y.shape[2],
        y.shape[3],
        triton.cdiv(height * width, splits),
        spacing,
        C=channels,
        ROWS=rows,
        BLOCK_ROWS=max(16, triton.next_power_of_2(rows)),
        **_window_constants(geometry),
    )
    return partial, pool_row


Weights = tuple[Tensor, Tensor, Tensor | None]


def _input_grad(
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
        **_layer_constants(x, weight_gwc, weight_pwc, geometry),
    )
    return dx


def _weight_grad(
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
        **_layer_constants(x, weight_gwc, weight_pwc, geometry),
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


def gap_softmax_fusion(u3: Tensor, u1: Tensor) -> tuple[Tensor, Tensor]:
    """Y [N, M, H, W], channels_last, and the gate's argument S3 - S1, [N, M] float32."""
    u3, u1 = channels_last(u3), channels_last(u1)
    y = torch.empty_like(u3)
    gate = u3.new_empty(u3.shape[:2], dtype=torch.float32)
    if u3.numel() == 0:
        return y, gate
    partial = _fusion_statistics(u3, u1, None)
    batch, channels, height, width = u3.shape
    wrap_triton(fusion_blend)[_blend_grid(u3)](
        u3, u1, partial, y, gate, batch, height * width, C=channels, SPLITS=partial.shape[0]
    )
    return y, gate


def gap_softmax_fusion_backward(grad: Tensor, u3: Tensor, u1: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of u3 and u1, channels_last.

    Args:
        grad: dL/dY, [N, M, H, W].
        u3, u1: the branches.
        gate: S3 - S1, [N, M] float32.
    """
    grad, u3, u1 = channels_last(grad), channels_last(u3), channels_last(u1)
    du3, du1 = torch.empty_like(u3), torch.empty_like(u3)
    if u3.numel() == 0:
        return du3, du1
    partial = _fusion_statistics(u3, u1, grad)
    batch, channels, height, width = u3.shape
    wrap_triton(fusion_blend_grad)[_blend_grid(u3)](
        grad, partial, gate, du3, du1, batch, height * width, C=channels, SPLITS=partial.shape[0]
    )
    return du3, du1


def _fusion_statistics(u3: Tensor, u1: Tensor, grad: Tensor | None) -> Tensor:
    """Partial sums of U3 - U1, weighted by ``grad`` if given: [splits, N, M] float32."""
    batch, channels, height, width = u3.shape
    pixels = height * width
    blocks = batch * triton.cdiv(channels, 64)
    splits = max(1, min(triton.cdiv(TARGET_PROGRAMS, blocks), triton.cdiv(pixels, 256), 16))
    partial = u3.new_empty((splits, batch, channels), dtype=torch.float32)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return batch * triton.cdiv(channels, meta["BLOCK_C"]), splits

    wrap_triton(fusion_statistics)[grid](
        u3,
        u1,
        u3 if grad is None else grad,
        partial,
        batch,
        pixels,
        triton.cdiv(pixels, splits),
        C=channels,
        WEIGHTED=grad is not None,
    )
    return partial


def _blend_grid(u3: Tensor) -> Grid:
    batch, channels, height, width = u3.shape

    def grid(meta: dict[str, Any]) -> tuple[int]:
        pixel_blocks = triton.cdiv(height * width, meta["BLOCK_PIX"])
        return (batch * pixel_blocks * triton.cdiv(channels, meta["BLOCK_C"]),)

    return grid


def _forward_grid(pixels: int, weight_gwc: Tensor, geometry: Geometry) -> Grid:
    def grid(meta: dict[str, Any]) -> tuple[int]:
        per_group = triton.cdiv(weight_gwc.shape[0] // geometry.groups, meta["BLOCK_CO"])
        return (triton.cdiv(pixels, meta["BLOCK_PIX"]) * geometry.groups * per_group,)

    return grid


def _window_constants(geometry: Geometry) -> dict[str, int]:
    """The window, compiled into a layer's kernels."""
    return {
        "KH": geometry.kernel_size[0],
        "KW": geometry.kernel_size[1],
        "STRIDE_H": geometry.stride[0],
        "STRIDE_W": geometry.stride[1],
        "PAD_H": geometry.padding[0],
        "PAD_W": geometry.padding[1],
        "DILATION_H": geometry.dilation[0],
        "DILATION_W": geometry.dilation[1],
    }


def _layer_constants(x: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry) -> dict[str, Any]:
    """Channels, groups, window and precision, compiled into a layer's kernels."""
    return {
        "CR": weight_pwc.shape[1],
        "CO": weight_gwc.shape[0],
        "G": geometry.groups,
        "PRECISION": dot_precision(x.dtype),
        **_window_constants(geometry),
    }


def pixel_arguments(x: Tensor, y: Tensor) -> tuple[int, int, int, int, int]:
    """Output pixels of the batch, and H, W, H_out, W_out.

    Raises:
        ValueError: more pixels than 32 bits can number (elements are counted in 64).
    """
    batch, _, height, width = x.shape
    pixels = batch * y.shape[2] * y.shape[3]
    if max(pixels, batch * height * width) > MAX_PIXELS:
        raise ValueError(f"x must have at most {MAX_PIXELS} pixels in a batch, got {list(map(int, x.shape))}")
    return pixels, height, width, y.shape[2], y.shape[3]


def empty_output(x: Tensor, weight_gwc: Tensor, geometry: Geometry) -> Tensor:
    """Uninitialised [N, M, H_out, W_out], channels_last."""
    return empty_channels_last(x, weight_gwc.shape[0], *geometry.output_size(x.shape[2], x.shape[3]))


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: as PyTorch's setting for convolutions says."""
    if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return "tf32"
    return "ieee"


def channels_last(x: Tensor) -> Tensor:
    """``x`` with its channels next to each other and no gaps; a copy unless it is already."""
    return x.contiguous(memory_format=torch.channels_last)


def pixel_major(x: Tensor) -> tuple[Tensor, int]:
    """``x`` and the distance of its pixels, in elements; a copy unless they are evenly spaced and channels adjacent.

    A slice of the channels of a channels_last tensor is read in place. Axes of one element may have any stride.
    """
    _, channels, height, width = x.shape
    spacing = channels
    for axis, pixels in ((0, height * width), (2, width), (3, 1)):
        if x.shape[axis] > 1:
            spacing = x.stride(axis) // pixels
    evenly = all(
        x.shape[axis] == 1 or x.stride(axis) == step
        for axis, step in ((1, 1), (0, height * width * spacing), (2, width * spacing), (3, spacing))
    )
    return (x, spacing) if evenly else (channels_last(x), channels)


def empty_channels_last(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Uninitialised [N, channels, height, width] of the dtype and device of ``x``."""
    return torch.empty(
        (x.shape[0], channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
