"""The whole layer on ATen, keeping x and one number per (sample, output channel) for the backward.

Forward, in channels_last. The group-wise convolution is oneDNN's and the point-wise ones are matrix products over
pixels. Where a map has more pixels than x has channels, every further map costs more than weights for each sample: the
gate comes before the point-wise convolutions (:mod:`spconv_triton.native_gate`), and they are added in one product,

    Y = scale GWC(x3) + offset + [scale Wp | a gamma W1] z,   scale = a beta,   offset = a (beta b3 + gamma b1) + bias

Else U3 and U1 are made side by side, the gate comes from their means, and the blend is written over U1. In inference
a is the scale of a norm that follows, and a residual and an activation follow in place; else a is 1.

Backward. Let g = dL/dY, P the number of output pixels, d = S3 - S1 and per (sample, output channel)

    A     = sum_pixels g (U3 - U1)
    delta = beta gamma A / P                      dL/dS3 = -dL/dS1 = P delta, spread evenly by the GAP's gradient
    E3    = dL/dU3 = beta g + delta
    E1    = dL/dU1 = gamma g - delta

and everything else is linear in E3 and E1, with z the input of the point-wise convolutions (x, pooled at a stride):

    dx3 = GWC^T(E3) + pool^T(Wp^T E3)             dx1 = pool^T(W1^T E1)
    dWg = E3 (*) x3,   dWp = E3 z3^T,   dW1 = E1 z1^T,   db3 = sum E3,   db1 = sum E1

A needs the difference of the branches only, which is one pair of convolutions, GWC(x3) and [Wp, -W1] z. (It also falls
out of the weight gradients of single samples, A3[n,m] = sum W[m,.] G_n[m,.], but oneDNN takes longer over those.)
gamma is sigmoid(-d), not 1 - beta: where the gate is saturated the latter would be all rounding error.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import native
from .geometry import Geometry
from .native import NOTHING, Epilogue
from .native_gate import gate_difference

LARGE = 4 * 2**20
"""Bytes of Y above which the backward takes a few samples at a time: such a map outgrows what glibc's malloc keeps for
the next call. Measured on ResNet-50's layers."""

PART = 2 * 2**20
"""Bytes of each map of the backward when Y is large."""

ACCUMULATES = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")


def spconv2d(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """Y = beta U3 + gamma U1 + bias, on arguments that :func:`spconv_triton.functional.spconv2d` has checked.

    Args:
        x: [N, L, H, W], float32, float64, bfloat16 or float16.
        weight_gwc: [M, alpha L / G, k, k].
        weight_pwc: [M, alpha L, 1, 1].
        weight_redundant: [M, L - alpha L, 1, 1]; None where alpha = 1, and then Y = U3 + bias.
        bias: [M] or None, added after the gate.
        branch_bias: [2, M] or None, dtype of ``x`` or float32; added to U3 and U1 before the gate.

    Returns:
        [N, M, H_out, W_out], dtype of ``x``, in channels_last on a CPU.

    Source: Zhang et al., IJCAI 2020, sections 3.2 to 3.4.
    """
    arguments = (x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias, geometry)
    if weight_redundant is None or _is_transformed():
        return native.compose(*arguments)
    differentiates = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments)
    if torch.compiler.is_compiling():
        # What the backward below recomputes depends on no gradient, so the partitioner would move it into the forward
        # and keep it; a checkpoint tells it not to. Inductor fuses the blend either way.
        if differentiates and not torch.compiler.is_exporting():
            return checkpoint(native.compose, *arguments, use_reentrant=False, preserve_rng_state=False)
        return native.compose(*arguments)
    if differentiates:
        return OnePass.apply(*arguments)
    y, _ = _forward(x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias, geometry)
    return y


def spconv2d_inference(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    geometry: Geometry,
    after: Epilogue,
) -> Tensor:
    """Y = activation(norm_scale (beta U3 + gamma U1) + bias + residual), without gradients.

    Arguments and result as of :func:`spconv2d`; ``bias`` may also be float32.
    """
    arguments = (x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias, geometry, after)
    if _is_transformed() or torch.compiler.is_compiling():
        return native.compose(*arguments)
    y, _ = _forward(*arguments)
    return y


def _is_transformed() -> bool:
    """Whether function transforms or forward-mode differentiation look into every operation; they get plain ones."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


class OnePass(torch.autograd.Function):
    """Y from the arguments of :func:`spconv2d`; keeps them and d = S3 - S1."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.geometry = arguments
        y, d = _forward(*arguments)
        ctx.save_for_backward(*tensors, d)
        return y.data  # a view of nothing: autograd forbids an in-place ReLU behind a Function that returns a view

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        *inputs, d = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*_differentiable_gradients(inputs, ctx.geometry, grads[0]), None)
        return (*_gradients(inputs, ctx.geometry, d, grads[0], ctx.needs_input_grad), None)


def _forward(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    geometry: Geometry,
    after: Epilogue = NOTHING,
) -> tuple[Tensor, Tensor | None]:
    """Y and d = S3 - S1, [N, M, 1, 1], in float32 or better; None without a redundant part."""
    representative = weight_pwc.shape[1]
    x = _channels_last(x)
    z = native.pointwise_input(x, geometry)
    x3, z3, z1 = x[:, :representative], z[:, :representative], z[:, representative:]
    if weight_redundant is None:
        y = _add_convolution(_convolve(x3, weight_gwc, None, *geometry[1:]), z3, weight_pwc)
        return _finish(y, _offset(None, bias, branch_bias, after, y.dtype), after, x.dtype), None

    if gate_comes_first(x, geometry):
        y = _convolve(x3, weight_gwc, None, *geometry[1:])
        d = gate_difference(y, z, weight_pwc, weight_redundant)
        if branch_bias is not None:
            d += _bias_difference(branch_bias, d.dtype)
        beta, gamma = torch.sigmoid(d), torch.sigmoid(-d)
        if after.norm_scale is not None:
            beta, gamma = (gate * after.norm_scale.to(d.dtype)[:, None, None] for gate in (beta, gamma))
        offset = _offset(d, bias, branch_bias, after, d.dtype)
        y = y.mul_(beta) if offset is None else torch.addcmul(offset, y, beta, out=y)
        if after.residual is not None:
            y += after.residual
        weights = torch.cat(
            (weight_pwc.flatten(1) * beta.flatten(2), weight_redundant.flatten(1) * gamma.flatten(2)), 2
        )
        _pixels(y).baddbmm_(_pixels(z), weights.transpose(1, 2))
        return native.activate(y, after.activation, inplace=True), d

    # An output bias alone may join both branches: beta + gamma = 1, and the gate sees their difference.
    joins = bias is not None and branch_bias is None and after.norm_scale is None and bias.dtype == x.dtype
    joins = joins and _is_precise(x.dtype)
    u3 = _convolve(x3, weight_gwc, bias if joins else None, *geometry[1:])
    u3 = _add_convolution(u3, z3, weight_pwc)
    u1 = _pointwise(z1, weight_redundant, bias if joins else None)
    d = u3.mean((2, 3), keepdim=True).sub_(u1.mean((2, 3), keepdim=True))
    if branch_bias is not None:
        d += _bias_difference(branch_bias, d.dtype)
    y = u1.lerp_(u3, torch.sigmoid(d))
    return _finish(y, None if joins else _offset(d, bias, branch_bias, after, d.dtype), after, x.dtype), d


def _finish(y: Tensor, offset: Tensor | None, after: Epilogue, dtype: torch.dtype) -> Tensor:
    """activation(a y + offset + residual) in ``dtype``, in place where that is the dtype of ``y``."""
    if after.norm_scale is not None:
        scale = after.norm_scale.to(y.dtype)[:, None, None]
        y = y.mul_(scale) if offset is None else torch.addcmul(offset, y, scale, out=y)
    elif offset is not None:
        y += offset
    if after.residual is not None:
        y += after.residual
    return native.activate(y, after.activation, inplace=True).to(dtype)


def _gradients(
    inputs: list[Any], geometry: Geometry, d: Tensor, grad: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of the six tensor arguments, where ``needed``.

    Where maps are large, a few samples at a time: scratch maps that together outgrow what malloc keeps would be
    returned to the system and faulted in again at every call.
    """
    x, *others = inputs
    if not _is_large(grad, grad.shape[1]):
        return _gradients_of_samples(x, *others, geometry=geometry, d=d, grad=grad, needed=needed)
    samples = max(1, PART * grad.shape[0] // (grad.numel() * grad.element_size()))
    parts = zip(x.split(samples), d.split(samples), grad.split(samples), strict=True)
    dx = torch.empty_like(x) if needed[0] else None
    sums: list[Tensor | None] = [None] * len(others)
    for i, (x_part, d_part, grad_part) in enumerate(parts):
        dx_part, *terms = _gradients_of_samples(
            x_part, *others, geometry=geometry, d=d_part, grad=grad_part, needed=needed
        )
        if dx is not None and dx_part is not None:
            dx[i * samples : (i + 1) * samples] = dx_part
        sums = [
            term if total is None or term is None else total.add_(term) for total, term in zip(sums, terms, strict=True)
        ]
    return dx, *sums


def _gradients_of_samples(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    *,
    geometry: Geometry,
    d: Tensor,
    grad: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients that these samples contribute; symbols as at the head of this file."""
    representative, window = weight_pwc.shape[1], geometry[1:]
    x, grad = _channels_last(x), _channels_last(grad)
    z = native.pointwise_input(x, geometry)
    x3, z3, z1 = x[:, :representative], z[:, :representative], z[:, representative:]
    g = grad.to(d.dtype)
    beta, gamma = torch.sigmoid(d), torch.sigmoid(-d)

    # One map serves g (U3 - U1), then E3, then E1.
    scratch = _convolve(z, torch.cat((weight_pwc, -weight_redundant), 1))
    scratch = _add_convolution(scratch, x3, weight_gwc, *window)
    a = scratch.mul_(g).sum((2, 3), keepdim=True)
    dbias = dbranch_bias = None
    if bias is not None or branch_bias is not None:
        total = g.sum((2, 3), keepdim=True)
        if bias is not None:
            dbias = total.sum((0, 2, 3)).to(bias.dtype)
        if branch_bias is not None:
            a += total * _bias_difference(branch_bias, d.dtype)
            to_s3 = beta * gamma * a
            dbranch_bias = torch.stack(((beta * total + to_s3).sum((0, 2, 3)), (gamma * total - to_s3).sum((0, 2, 3))))
            dbranch_bias = dbranch_bias.to(branch_bias.dtype)
    delta = beta * gamma * a / (g.shape[2] * g.shape[3])

    dx3 = dweight_gwc = dweight_pwc = dweight_redundant = dz3 = dz1 = dx = None
    e = torch.addcmul(delta, g, beta, out=scratch).to(x.dtype)
    if needed[0] or needed[1]:
        dx3, dweight_gwc = _convolution_backward(e, x3, weight_gwc, needed[:2], *window)
    if needed[2]:
        dweight_pwc = _convolution_backward(e, z3, weight_pwc, (False, True))[1]
    if dx3 is not None:
        transposed = weight_pwc.transpose(0, 1).contiguous()
        dz3 = _add_convolution(dx3, e, transposed) if z is x else F.conv2d(e, transposed)

    e = torch.addcmul(-delta, g, gamma, out=scratch).to(x.dtype)
    if needed[3]:
        dweight_redundant = _convolution_backward(e, z1, weight_redundant, (False, True))[1]
    if dx3 is not None and dz3 is not None:
        dz1 = F.conv2d(e, weight_redundant.transpose(0, 1).contiguous())
        dx = torch.cat((dz3, dz1), 1)
        if z is not x:
            dx = native.pointwise_input_adjoint(dx, (x.shape[2], x.shape[3]), geometry)
            dx[:, :representative] += dx3
    return dx, dweight_gwc, dweight_pwc, dweight_redundant, dbias, dbranch_bias


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    needed: tuple[bool, ...],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``F.conv2d(x, weight, None, stride, ...)`` by ``x`` and ``weight``, where ``needed``."""
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (*needed, False)
    )[:2]


def _differentiable_gradients(inputs: list[Any], geometry: Geometry, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients where they will themselves be differentiated: by the chain rule through the parts."""
    present = [i for i, tensor in enumerate(inputs) if tensor is not None]

    def layer(*tensors: Tensor) -> Tensor:
        arguments = list(inputs)
        for i, tensor in zip(present, tensors, strict=True):
            arguments[i] = tensor
        x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias = arguments
        return native.compose(x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias, geometry)

    pullback = torch.func.vjp(layer, *(inputs[i] for i in present))[1]
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(present, pullback(grad), strict=True):
        gradients[i] = gradient
    return tuple(gradients)


def gate_comes_first(x: Tensor, geometry: Geometry) -> bool:
    """Whether the weights of every sample, scaled by its gate, are a smaller thing than one more map."""
    height, width = geometry.output_size(x.shape[2], x.shape[3])
    return height * width > x.shape[1] and _is_matrix_product(x)


def _is_large(x: Tensor, outputs: int) -> bool:
    """Whether a map of ``outputs`` channels is worth sparing: it outgrows what malloc keeps for the next call."""
    size = x.shape[0] * outputs * x.shape[2] * x.shape[3] * x.element_size()
    return x.device.type == "cpu" and _is_precise(x.dtype) and size > LARGE


def _is_precise(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64)


def _channels_last(x: Tensor) -> Tensor:
    """``x`` in the layout whose convolutions are the fast ones on a CPU; GPUs take either."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def _offset(
    d: Tensor | None, bias: Tensor | None, branch_bias: Tensor | None, after: Epilogue, dtype: torch.dtype
) -> Tensor | None:
    """What the biases add to Y, [N, M, 1, 1] or [M, 1, 1]: a (beta b3 + gamma b1) + bias. Without ``d`` beta is 1."""
    columns = None if bias is None else bias.to(dtype)[:, None, None]
    if branch_bias is None:
        return columns
    shift3, shift1 = branch_bias.to(dtype)[:, :, None, None].unbind()
    offset = shift3 if d is None else torch.sigmoid(d) * shift3 + torch.sigmoid(-d) * shift1
    if after.norm_scale is not None:
        offset = offset * after.norm_scale.to(dtype)[:, None, None]
    return offset if columns is None else offset + columns


def _bias_difference(branch_bias: Tensor, dtype: torch.dtype) -> Tensor:
    """b3 - b1, [M, 1, 1], subtracted in ``dtype``."""
    shift3, shift1 = branch_bias.to(dtype).unbind()
    return (shift3 - shift1)[:, None, None]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, *window: Any) -> Tensor:
    """A convolution as a new tensor, in float32 or better."""
    y = F.conv2d(x, weight, bias, *window)
    return _channels_last(y.to(torch.promote_types(x.dtype, torch.float32)))


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1 x 1 convolution as a new tensor, likewise."""
    if not _is_matrix_product(x):
        return _convolve(x, weight, bias)
    pixels, columns = _pixels(x).flatten(0, 1), weight.flatten(1).t()
    y = torch.mm(pixels, columns) if bias is None else torch.addmm(bias, pixels, columns)
    return y.view(x.shape[0], *x.shape[2:], weight.shape[0]).permute(0, 3, 1, 2)


def _add_convolution(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """``y``, in channels_last on a CPU, plus a convolution, in place."""
    pointwise = weight.shape[1:] == (x.shape[1], 1, 1) and (*stride, *padding) == (1, 1, 0, 0)
    if pointwise and _is_matrix_product(x) and y.dtype == x.dtype:
        _pixels(y).flatten(0, 1).addmm_(_pixels(x).flatten(0, 1), weight.flatten(1).t())
        return y
    if _can_accumulate(y, x):
        # oneDNN adds in the convolution's epilogue: the operator that Inductor uses for a convolution and a sum.
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            y, x, weight, None, padding, stride, dilation, groups, "add", 1.0, None, [], None
        )
    return y.add_(F.conv2d(x, weight, None, stride, padding, dilation, groups))


def _is_matrix_product(x: Tensor) -> bool:
    """Whether a 1 x 1 convolution of ``x`` is a matrix product over pixels: on a CPU it takes less time than oneDNN's,
    by half where channels are few or a slice.

    Not under a dispatch mode: FLOP counters know convolutions, not products in place.
    """
    return x.device.type == "cpu" and _is_precise(x.dtype) and torch._C._len_torch_dispatch_stack() == 0


def _pixels(x: Tensor) -> Tensor:
    """[N, C, H, W] in channels_last as [N, H W, C], a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _can_accumulate(y: Tensor, x: Tensor) -> bool:
    """Whether oneDNN convolves into ``y``; not under a dispatch mode (a FLOP counter, fakes): it would not know how."""
    return (
        ACCUMULATES
        and y.dtype == x.dtype == torch.float32
        and y.device.type == "cpu"
        and y.numel() > 0
        and torch._C._len_torch_dispatch_stack() == 0
    )
