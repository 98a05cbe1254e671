"""SPConv part by part: U3, U1 and their blend, in operations that autograd, ``torch.func`` and Inductor see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

from .. import reference
from ..dispatch import is_exporting, is_transformed
from ..epilogue import Epilogue
from ..geometry import Geometry
from . import traced
from .convolution import convolution, in_nchw, misses_weight_gradient

POOLS_EVEN_OR_ODD = torch.__version__ < TorchVersion("2.12")
"""Whether what is compiled with pooling in ceil mode is for even sizes only, or for odd ones."""


def pointwise_input(x: Tensor, geometry: Geometry) -> Tensor:
    """What the 1 x 1 convolutions read, [N, C, H_out, W_out]: the centre taps, pooled at a stride."""
    if geometry.stride == (1, 1):
        if geometry.is_centred:
            return x
        (top, left), (height, width) = geometry.centre, geometry.output_size(x.shape[2], x.shape[3])
        return F.pad(x, (-left, left + width - x.shape[3], -top, top + height - x.shape[2]))
    if not geometry.is_centred or _traces_symbols(x):
        return reference.pointwise_input(
            x,
            geometry.kernel_size,
            geometry.output_size(x.shape[2], x.shape[3]),
            **geometry.window,
        )
    # Half-window padding: output size is ceil(H / stride), which is average pooling in ceil mode.
    return F.avg_pool2d(x, geometry.stride, ceil_mode=True, count_include_pad=False)


def _traces_symbols(x: Tensor) -> bool:
    """Whether sizes may vary of which nothing may be asked.

    Pooling in ceil mode asks whether 2 ((H - 1) // 2) < H, and ``torch.export`` cannot tell that it holds for any H;
    strictly, every size that it sees may vary. ``torch.compile`` asks whether H is even, before PyTorch 2.12.
    """
    if not is_exporting():
        return POOLS_EVEN_OR_ODD and torch.compiler.is_compiling()
    return torch.compiler.is_dynamo_compiling() or not all(type(size) is int for size in x.shape[2:])


def pointwise_input_adjoint(grad: Tensor, size: tuple[int, int], geometry: Geometry) -> Tensor:
    """The transpose of :func:`pointwise_input`: [N, C, H_out, W_out] -> [N, C, *size].

    The windows of the pooling lie side by side, so every value goes, divided by its window's valid pixels, to each of
    the pixels of that window.
    """
    pads: list[int] = []
    for axis, (first, stride, length) in enumerate(zip(geometry.centre, geometry.stride, size, strict=True), start=2):
        out = grad.shape[axis]
        pads = [first, length - first - stride * out, *pads]
        if stride > 1:
            start = torch.arange(out, device=grad.device) * stride + first
            valid = ((start + stride).clamp(max=length) - start.clamp(min=0)).clamp(min=1).to(grad.dtype)
            grad = grad / (valid[:, None] if axis == 2 else valid)
    if geometry.stride != (1, 1):
        grad = F.interpolate(grad, scale_factor=tuple(map(float, geometry.stride)), mode="nearest")
    return F.pad(grad, pads) if any(pads) else grad


def pointwise(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """1 x 1 convolution of the centre taps: x [N, C, H, W], weight [M, C, 1, 1] -> [N, M, H_out, W_out]."""
    if torch.compiler.is_compiling():
        x = traced.part(x)
    return F.conv2d(pointwise_input(x, geometry), weight)


def representative_branch(x3: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry) -> Tensor:
    """U3 = GWC(x3) + PWC(x3); shapes as in :func:`spconv_triton.functional.representative_branch`."""
    if torch.compiler.is_compiling():
        x3 = traced.part(x3)
        gwc = traced.convolution(x3, weight_gwc, *geometry[1:])
    else:
        read, weight = x3, weight_gwc
        if misses_weight_gradient(read, weight, geometry.dilation):
            read, weight = in_nchw(read, weight)
        gwc = convolution(read, weight, None, *geometry[1:])
    return gwc + pointwise(x3, weight_pwc, geometry)


def gap_softmax_fusion(u3: Tensor, u1: Tensor) -> Tensor:
    """Y = beta U3 + gamma U1; shapes as in :func:`spconv_triton.functional.gap_softmax_fusion`."""
    if torch.compiler.is_compiling() and torch.is_grad_enabled() and not (is_exporting() or is_transformed()):
        return traced.gap_softmax_fusion(u3, u1)
    return reference.gap_softmax_fusion(u3, u1)


def compose_batch_norm(
    tensors: Sequence[Any], eps: tuple[float, float], geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Y, mean and variance of a layer with batch norms in its branches, part by part.

    Args:
        tensors: as of :func:`spconv_triton.functional.spconv2d_batch_norm`: x, the three weights, the bias, and weight
            and bias of either norm.
        eps: of either norm.
    """
    x, weight_gwc, weight_pwc, weight_redundant, *parameters = tensors
    representative = weight_pwc.shape[1]
    x3, x1 = x.split((representative, x.shape[1] - representative), 1)
    u3 = representative_branch(x3, weight_gwc, weight_pwc, geometry)
    return _blend_normed((u3, pointwise(x1, weight_redundant, geometry)), parameters, eps)


def _blend_normed(
    branches: tuple[Tensor, Tensor], parameters: Sequence[Tensor | None], eps: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Y, mean and variance from U3 and U1.

    Args:
        parameters: the layer's bias, and weight and bias of either norm.
        eps: of either norm.
    """
    bias, *of_norms = parameters
    precise = torch.promote_types(branches[0].dtype, torch.float32)
    with torch.no_grad():
        pairs = [torch.var_mean(u.to(precise), (0, 2, 3), correction=0) for u in branches]
    variance, mean = (torch.stack(values) for values in zip(*pairs, strict=True))
    norms = (of_norms[:2], of_norms[2:])

    def widened(parameter: Tensor | None) -> Tensor | None:
        """ATen takes float32 parameters beside a map in half precision, but not beside float64, nor two dtypes."""
        return None if parameter is None else parameter.to(precise)

    def normed(u: Tensor, weight: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
        if weight is None and shift is not None:  # on a GPU ATen fails to differentiate that
            weight = torch.ones_like(shift)
        return F.batch_norm(u, None, None, widened(weight), widened(shift), training=True, eps=eps)

    y = gap_softmax_fusion(*(normed(u, w, b, e) for u, (w, b), e in zip(branches, norms, eps, strict=True)))
    return y if bias is None else y + bias[:, None, None], mean, variance


def compose(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    geometry: Geometry,
    after: Epilogue | None = None,
) -> Tensor:
    """The layer part by part, arguments as of :func:`spconv_triton.native.onepass.spconv2d_inference`.

    Autograd and ``torch.func`` differentiate it as often as asked, with U3 and U1 in memory.
    """
    representative = weight_pwc.shape[1]
    x3, x1 = x.split((representative, x.shape[1] - representative), 1)
    y = representative_branch(x3, weight_gwc, weight_pwc, geometry)
    if branch_bias is not None:
        y = (y + branch_bias[0, :, None, None]).to(x3.dtype)
    if weight_redundant is not None:
        u1 = pointwise(x1, weight_redundant, geometry)
        if branch_bias is not None:
            u1 = (u1 + branch_bias[1, :, None, None]).to(x3.dtype)
        y = gap_softmax_fusion(y, u1)
    if after is not None:
        return after(y, bias)
    return y if bias is None else y + bias[:, None, None]
