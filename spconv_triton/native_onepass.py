"""The whole layer on ATen, keeping x and one number per (sample, output channel) for the backward.

Forward, in channels_last. The group-wise convolution is oneDNN's and the point-wise ones are matrix products over
pixels. Where a map has more pixels than x has channels, every further map costs more than weights for each sample: the
gate comes before the point-wise convolutions (:mod:`spconv_triton.native_gate`), and they are added in one product,

    Y = scale GWC(x3) + offset + [scale Wp | a gamma W1] z,   scale = a beta,   offset = a (beta b3 + gamma b1) + bias

Else U3 and U1 are made side by side, the gate comes from their means, and the blend is written over U1. In inference
a is the scale of a norm that follows, and a residual and an activation follow in place; else a is 1.

The backward is :mod:`spconv_triton.native_backward`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import native, native_compiled
from .autocast import without_autocast
from .dispatch import is_exporting, is_transformed
from .geometry import Geometry
from .native import NOTHING, Epilogue
from .native_backward import differentiable_gradients, gradients
from .native_convolution import add_convolution, channels_last, convolve, is_matrix_product, pixels, pointwise
from .native_gate import (
    bias_difference,
    exponent,
    exponent_of_infinities,
    gate_comes_first,
    gate_difference,
)
from .native_packing import Packing


def spconv2d(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    geometry: Geometry,
    packing: Packing | None = None,
) -> Tensor:
    """Y = beta U3 + gamma U1 + bias, on arguments that :func:`spconv_triton.functional.spconv2d` has checked.

    Args:
        x: [N, L, H, W], float32, float64, bfloat16 or float16.
        weight_gwc: [M, alpha L / G, k, k].
        weight_pwc: [M, alpha L, 1, 1].
        weight_redundant: [M, L - alpha L, 1, 1]; None where alpha = 1, and then Y = U3 + bias.
        bias: [M] or None, added after the gate.
        branch_bias: [2, M] or None, dtype of ``x`` or float32; added to U3 and U1 before the gate.
        packing: of the layer in inference; what it keeps of ``weight_gwc``.

    Returns:
        [N, M, H_out, W_out], dtype of ``x``, in channels_last on a CPU.

    Source: Zhang et al., IJCAI 2020, sections 3.2 to 3.4.
    """
    arguments = (x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias, geometry)
    if weight_redundant is None or is_transformed():
        return native.compose(*arguments)
    differentiated = differentiates(arguments)
    if torch.compiler.is_compiling():
        # What the backward below recomputes depends on no gradient, so the partitioner would move it into the forward
        # and keep it; a checkpoint tells it not to. On a CPU there is an operator for this.
        if differentiated and not is_exporting():
            return checkpoint(native.compose, *arguments, use_reentrant=False, preserve_rng_state=False)
        return native_compiled.compose(*arguments)
    if differentiated:
        return OnePass.apply(*arguments)
    y, _ = forward(*arguments, packing=packing)
    return y


def differentiates(arguments: tuple[Any, ...]) -> bool:
    """Whether autograd wants gradients of any of them."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments)


def spconv2d_inference(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    geometry: Geometry,
    after: Epilogue,
    packing: Packing | None = None,
) -> Tensor:
    """Y = activation(norm_scale (beta U3 + gamma U1) + bias + residual), without gradients.

    Arguments and result as of :func:`spconv2d`; ``bias`` may also be float32.
    """
    arguments = (x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias, geometry, after)
    if is_transformed():
        return native.compose(*arguments)
    if torch.compiler.is_compiling():
        return native_compiled.compose(*arguments)
    y, _ = forward(*arguments, packing=packing)
    return y


class OnePass(torch.autograd.Function):
    """Y from the arguments of :func:`spconv2d`; keeps them and d = S3 - S1."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.geometry = arguments
        y, d = forward(*arguments)
        ctx.save_for_backward(*tensors, d)
        return y.data  # a view of nothing: autograd forbids an in-place ReLU behind a Function that returns a view

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        *inputs, d = ctx.saved_tensors
        with without_autocast(grads[0]):
            if torch.is_grad_enabled():
                return (*differentiable_gradients(inputs, ctx.geometry, grads[0]), None)
            return (*gradients(inputs, ctx.geometry, d, grads[0], ctx.needs_input_grad), None)


def forward(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    geometry: Geometry,
    after: Epilogue = NOTHING,
    *,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Y and d = S3 - S1, [N, M, 1, 1], in float32 or better; None without a redundant part. Without gradients."""
    representative = weight_pwc.shape[1]
    x = channels_last(x)
    z = native.pointwise_input(x, geometry)
    x3 = x.narrow(1, 0, representative)  # which takes half the time of an index
    z3 = x3 if z is x else z.narrow(1, 0, representative)
    if weight_redundant is None:
        y = add_convolution(_gwc(x3, weight_gwc, None, geometry, packing), z3, weight_pwc)
        return _finish(y, _offset(None, bias, branch_bias, after, y.dtype), after, x.dtype), None

    if gate_comes_first(x, geometry):
        y = _gwc(x3, weight_gwc, None, geometry, packing)
        d = gate_difference(y, z, weight_pwc, weight_redundant)
        if branch_bias is not None:
            d += bias_difference(branch_bias, d.dtype)
        if not math.isfinite(d.sum()):
            d = exponent_of_infinities(y, z, weight_pwc, weight_redundant, branch_bias)
        beta, gamma = torch.sigmoid(d), torch.sigmoid(-d)
        if after.norm_scale is not None:
            beta, gamma = (gate * after.norm_scale.to(d.dtype)[:, None, None] for gate in (beta, gamma))
        offset = _offset(d, bias, branch_bias, after, d.dtype)
        y = y.mul_(beta) if offset is None else torch.addcmul(offset, y, beta, out=y)
        if after.residual is not None:
            y += after.residual
        weights = y.new_empty((y.shape[0], y.shape[1], z.shape[1]))
        of_z3 = weights.narrow(2, 0, representative)
        of_z1 = weights.narrow(2, representative, z.shape[1] - representative)
        torch.mul(weight_pwc.flatten(1), beta.squeeze(3), out=of_z3)
        torch.mul(weight_redundant.flatten(1), gamma.squeeze(3), out=of_z1)
        pixels(y).baddbmm_(pixels(z), weights.transpose(1, 2))
        return native.activate(y, after.activation, inplace=True), d

    # An output bias alone may join both branches: beta + gamma = 1, and the gate sees their difference, which an
    # infinite one would make NaN.
    joins = branch_bias is None and after.norm_scale is None and is_matrix_product(x)
    joins = joins and bias is not None and bias.dtype == x.dtype and math.isfinite(bias.sum())
    u3 = _gwc(x3, weight_gwc, bias if joins else None, geometry, packing)
    u3 = add_convolution(u3, z3, weight_pwc)
    z1 = z.narrow(1, representative, z.shape[1] - representative)
    u1 = pointwise(z1, weight_redundant, bias if joins else None)
    s3, s1 = u3.mean((2, 3), keepdim=True), u1.mean((2, 3), keepdim=True)
    if branch_bias is not None:
        s3 += branch_bias[0, :, None, None]
        s1 += branch_bias[1, :, None, None]
    d = exponent(s3, s1)
    y = u1.lerp_(u3, torch.sigmoid(d))
    return _finish(y, None if joins else _offset(d, bias, branch_bias, after, d.dtype), after, x.dtype), d


def _gwc(x3: Tensor, weight_gwc: Tensor, bias: Tensor | None, geometry: Geometry, packing: Packing | None) -> Tensor:
    """GWC(x3) + bias as a new tensor, in float32 or better."""
    y = None if packing is None else packing.convolve(x3, weight_gwc, bias, *geometry[1:])
    return convolve(x3, weight_gwc, bias, *geometry[1:]) if y is None else y


def _finish(y: Tensor, offset: Tensor | None, after: Epilogue, dtype: torch.dtype) -> Tensor:
    """activation(a y + offset + residual) in ``dtype``, in place where that is the dtype of ``y``."""
    if after.norm_scale is not None:
        scale = after.norm_scale.to(y.dtype)[:, None, None]
        y = y.mul_(scale) if offset is None else torch.addcmul(offset, y, scale, out=y)
    elif offset is not None:
        y += offset
    if after.residual is not None:
        y += after.residual
    y = native.activate(y, after.activation, inplace=True)
    return y if y.dtype == dtype else y.to(dtype)


def _offset(
    d: Tensor | None, bias: Tensor | None, branch_bias: Tensor | None, after: Epilogue, dtype: torch.dtype
) -> Tensor | None:
    """What the biases add to Y, [N, M, 1, 1] or [M, 1, 1]: a (beta b3 + gamma b1) + bias. Without ``d`` beta is 1."""
    columns = None if bias is None else bias.to(dtype).view(-1, 1, 1)
    if branch_bias is None:
        return columns
    shift3, shift1 = branch_bias.to(dtype)[:, :, None, None].unbind()
    offset = shift3 if d is None else torch.sigmoid(d) * shift3 + torch.sigmoid(-d) * shift1
    if after.norm_scale is not None:
        offset = offset * after.norm_scale.to(dtype)[:, None, None]
    return offset if columns is None else offset + columns
