"""From tensors to kernels: allocation, strides, grids. The only importer of the kernels.

Every function takes and returns plain tensors; differentiation and registration are :mod:`spconv_triton.ops`'s.
Activations are channels_last; what comes in another layout is copied.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
from einops import rearrange
from torch import Tensor
from torch.library import wrap_triton

from .geometry import Geometry
from .kernels.branch import branch_forward, branch_input_grad, branch_weight_grad
from .kernels.fusion import fusion_blend, fusion_blend_grad, fusion_statistics

BRANCH_FORWARD_KERNELS = (branch_forward,)
BRANCH_BACKWARD_KERNELS = (branch_input_grad, branch_weight_grad)
FUSION_FORWARD_KERNELS = (fusion_statistics, fusion_blend)
FUSION_BACKWARD_KERNELS = (fusion_statistics, fusion_blend_grad)

MAX_PIXELS = 2**31 - 1

TARGET_PROGRAMS = 512
"""How many programs a reduction is split into at least: a few for each of a large GPU's 80 to 150 processors. Fixed, so
that the order of summation, and with it every bit of the result, does not depend on the device."""


def representative_branch(x3: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry) -> Tensor:
    """U3, [N, M, H_out, W_out], channels_last.

    Args:
        x3: [N, alpha L, H, W]; a channel slice of a channels_last tensor is read in place.
        weight_gwc: [M, alpha L / G, k, k].
        weight_pwc: [M, alpha L, 1, 1].
    """
    x3 = pixel_major(x3)
    batch, _, height, width = x3.shape
    out_height, out_width = geometry.output_size(height, width)
    outputs = weight_gwc.shape[0]
    u3 = empty_channels_last(x3, outputs, out_height, out_width)
    pixels = batch * out_height * out_width
    if pixels == 0:
        return u3
    check_pixels(pixels, batch * height * width)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        per_group = triton.cdiv(outputs // geometry.groups, meta["BLOCK_CO"])
        return (triton.cdiv(pixels, meta["BLOCK_PIX"]) * geometry.groups * per_group,)

    wrap_triton(branch_forward)[grid](
        x3,
        pack_branch(weight_gwc, weight_pwc),
        u3,
        pixels,
        height,
        width,
        out_height,
        out_width,
        x3.stride(3),
        **_branch_constants(x3, weight_gwc, geometry),
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
    grad, x3 = channels_last(grad), pixel_major(x3)
    dx3 = _branch_input_grad(grad, x3, pack_branch(weight_gwc, weight_pwc), weight_gwc, geometry)
    packed = _branch_weight_grad(grad, x3, weight_gwc, geometry)
    d_gwc, d_pwc = unpack_branch(packed, weight_gwc, weight_pwc, geometry)
    return dx3, d_gwc, d_pwc


def _branch_input_grad(grad: Tensor, x3: Tensor, packed: Tensor, weight_gwc: Tensor, geometry: Geometry) -> Tensor:
    batch, representative, height, width = x3.shape
    stride_h, stride_w = geometry.stride
    dx3 = empty_channels_last(x3, representative, height, width)
    if batch == 0:
        return dx3
    phases = stride_h * stride_w
    phase_pixels = batch * triton.cdiv(height, stride_h) * triton.cdiv(width, stride_w)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        per_group = triton.cdiv(representative // geometry.groups, meta["BLOCK_C"])
        return (phases * triton.cdiv(phase_pixels, meta["BLOCK_PIX"]) * geometry.groups * per_group,)

    wrap_triton(branch_input_grad)[grid](
        grad,
        packed,
        dx3,
        phase_pixels,
        height,
        width,
        grad.shape[2],
        grad.shape[3],
        TAP_STEP_H=stride_h // gcd(stride_h, geometry.dilation[0]),
        TAP_STEP_W=stride_w // gcd(stride_w, geometry.dilation[1]),
        **_branch_constants(x3, weight_gwc, geometry),
    )
    return dx3


def _branch_weight_grad(grad: Tensor, x3: Tensor, weight_gwc: Tensor, geometry: Geometry) -> Tensor:
    """[alpha L + k k alpha L / G, M] float32, in the order of :func:`pack_branch`."""
    batch, representative, height, width = x3.shape
    outputs, per_group = weight_gwc.shape[:2]
    rows = representative + geometry.taps * per_group
    pixels = batch * grad.shape[2] * grad.shape[3]
    if pixels == 0:
        return x3.new_zeros((rows, outputs), dtype=torch.float32)
    # About 64 x 64 outputs a program, at least 1024 pixels a split.
    tiles = triton.cdiv(rows, 64) * triton.cdiv(outputs, 64)
    splits = max(1, min(triton.cdiv(TARGET_PROGRAMS, tiles), triton.cdiv(pixels, 1024)))
    partial = x3.new_empty((splits, rows, outputs), dtype=torch.float32)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        k_blocks = triton.cdiv(representative, meta["BLOCK_C"])
        k_blocks += geometry.taps * triton.cdiv(per_group, meta["BLOCK_C"])
        return k_blocks * geometry.groups * triton.cdiv(outputs // geometry.groups, meta["BLOCK_CO"]), splits

    wrap_triton(branch_weight_grad)[grid](
        grad,
        x3,
        partial,
        pixels,
        triton.cdiv(pixels, splits),
        height,
        width,
        grad.shape[2],
        grad.shape[3],
        x3.stride(3),
        **_branch_constants(x3, weight_gwc, geometry),
    )
    return partial.sum(0)


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


def _blend_grid(u3: Tensor) -> Any:
    batch, channels, height, width = u3.shape

    def grid(meta: dict[str, Any]) -> tuple[int]:
        pixel_blocks = triton.cdiv(height * width, meta["BLOCK_PIX"])
        return (batch * pixel_blocks * triton.cdiv(channels, meta["BLOCK_C"]),)

    return grid


def pack_branch(weight_gwc: Tensor, weight_pwc: Tensor) -> Tensor:
    """[alpha L + k k alpha L / G, M]: rows of the point-wise weight, then of each tap of the group-wise one."""
    pointwise = rearrange(weight_pwc, "m c 1 1 -> c m")
    return torch.cat([pointwise, rearrange(weight_gwc, "m c kh kw -> (kh kw c) m")])


def unpack_branch(packed: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`pack_branch`, in the weights' dtype and strides."""
    pointwise, taps = packed.split((weight_pwc.shape[1], geometry.taps * weight_gwc.shape[1]))
    kh, kw = geometry.kernel_size
    d_gwc, d_pwc = torch.empty_like(weight_gwc), torch.empty_like(weight_pwc)
    d_gwc.copy_(rearrange(taps, "(kh kw c) m -> m c kh kw", kh=kh, kw=kw))
    d_pwc.copy_(rearrange(pointwise, "c m -> m c 1 1"))
    return d_gwc, d_pwc


def _branch_constants(x3: Tensor, weight_gwc: Tensor, geometry: Geometry) -> dict[str, Any]:
    """What is fixed for a layer and compiled into its kernels."""
    return {
        "CR": x3.shape[1],
        "CO": weight_gwc.shape[0],
        "G": geometry.groups,
        "KH": geometry.kernel_size[0],
        "KW": geometry.kernel_size[1],
        "STRIDE_H": geometry.stride[0],
        "STRIDE_W": geometry.stride[1],
        "PAD_H": geometry.padding[0],
        "PAD_W": geometry.padding[1],
        "DILATION_H": geometry.dilation[0],
        "DILATION_W": geometry.dilation[1],
        "PRECISION": dot_precision(x3.dtype),
    }


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: as PyTorch's setting for convolutions says."""
    if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return "tf32"
    return "ieee"


def channels_last(x: Tensor) -> Tensor:
    """``x`` with its channels next to each other and no gaps; a copy unless it is already."""
    return x.contiguous(memory_format=torch.channels_last)


def pixel_major(x: Tensor) -> Tensor:
    """``x`` if its pixels lie at one distance from each other and their channels side by side, else a copy that does.

    A slice of the channels of a channels_last tensor qualifies.
    """
    height, width = x.shape[2:]
    pixel = x.stride(3)
    if x.stride(1) == 1 and x.stride(2) == width * pixel and x.stride(0) == height * width * pixel:
        return x
    return channels_last(x)


def empty_channels_last(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Uninitialised [N, channels, height, width] of the dtype and device of ``x``."""
    return torch.empty(
        (x.shape[0], channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def check_pixels(*counts: int) -> None:
    """Kernels number pixels in 32 bits and elements in 64.

    Raises:
        ValueError: a batch of more pixels than that.
    """
    if max(counts) > MAX_PIXELS:
        raise ValueError(f"x must have at most {MAX_PIXELS} pixels in a batch, got {max(counts)}")
