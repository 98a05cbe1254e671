"""The backward of the whole layer on ATen.

Let g = dL/dY, P the number of output pixels, d = S3 - S1 and per (sample, output channel)

    A     = sum_pixels g (U3 - U1)
    delta = beta gamma A / P                      dL/dS3 = -dL/dS1 = P delta, spread evenly by the GAP's gradient
    E3    = dL/dU3 = beta g + delta
    E1    = dL/dU1 = gamma g - delta

and everything else is linear in E3 and E1, with z the input of the point-wise convolutions (x, pooled at a stride):

    dx3 = GWC^T(E3) + pool^T(Wp^T E3)             dx1 = pool^T(W1^T E1)
    dWg = E3 (*) x3,   dWp = E3 z3^T,   dW1 = E1 z1^T,   db3 = sum E3,   db1 = sum E1

A needs the difference of the branches only, GWC(x3) + [Wp, -W1] z. Where a map has more pixels than x has channels,
its point-wise part comes from the products of single samples G_n = g_n z_n^T, which the weight gradients need anyway:

    sum_pixels g [Wp, -W1] z = sum_c [Wp, -W1] G_n
    dWp = sum_n beta G_n3 + delta sum_pixels z3,       dW1 = sum_n gamma G_n1 - delta sum_pixels z1

That is one point-wise convolution less. (The group-wise part falls out of the same way, but oneDNN takes longer over
the weight gradients of single samples than over a convolution.) gamma is sigmoid(-d), not 1 - beta, and E1 is not
g - E3: where the gate is saturated they would be all rounding error.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .geometry import Geometry
from .native_convolution import add_convolution, channels_last, convolve, is_matrix_product, pixels, readable, rows
from .native_gate import bias_difference, gate_comes_first


def gradients(
    inputs: list[Any], geometry: Geometry, d: Tensor, grad: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of the six tensor arguments of :func:`spconv_triton.native_onepass.spconv2d`, where ``needed``.

    Args:
        inputs: those arguments; the redundant part is there.
        d: S3 - S1 of the forward, [N, M, 1, 1], float32 or better.
        grad: dL/dY, [N, M, H_out, W_out].

    Returns:
        Six tensors of the arguments' shapes and dtypes, None where not needed.
    """
    x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias = inputs
    representative, window = weight_pwc.shape[1], geometry[1:]
    x, grad = channels_last(x), channels_last(grad)
    z = channels_last(native.pointwise_input(x, geometry))  # one padded pixel of x comes out in NCHW
    x3, z3, z1 = x[:, :representative], z[:, :representative], z[:, representative:]
    g = grad.to(d.dtype)
    beta, gamma = torch.sigmoid(d), torch.sigmoid(-d)
    difference = torch.cat((weight_pwc, -weight_redundant), 1)

    # One map serves g (U3 - U1), then E3, then E1.
    products3 = products1 = None
    if gate_comes_first(x, geometry):
        products = torch.bmm(pixels(g).transpose(1, 2), pixels(z))
        products3, products1 = products[..., :representative], products[..., representative:]
        scratch = convolve(x3, weight_gwc, None, *window)
        a = scratch.mul_(g).sum((2, 3), keepdim=True)
        a += (products * difference.flatten(1)).sum(2)[:, :, None, None]
    else:
        scratch = add_convolution(convolve(z, difference), x3, weight_gwc, *window)
        a = scratch.mul_(g).sum((2, 3), keepdim=True)
    dbias = dbranch_bias = None
    if bias is not None or branch_bias is not None:
        total = g.sum((2, 3), keepdim=True)
        if bias is not None:
            dbias = total.sum((0, 2, 3)).to(bias.dtype)
        if branch_bias is not None:
            a += total * bias_difference(branch_bias, d.dtype)
            to_s3 = beta * gamma * a
            dbranch_bias = torch.stack(((beta * total + to_s3).sum((0, 2, 3)), (gamma * total - to_s3).sum((0, 2, 3))))
            dbranch_bias = dbranch_bias.to(branch_bias.dtype)
    delta = beta * gamma * a / (g.shape[2] * g.shape[3])

    dweight_gwc = dweight_pwc = dweight_redundant = None
    dx = torch.empty_like(z) if needed[0] else None  # of z, as yet
    e = torch.addcmul(delta, g, beta, out=scratch).to(x.dtype)
    if dx is not None or needed[1]:
        dx3, dweight_gwc = _convolution_backward(e, x3, weight_gwc, needed[:2], *window)
    if needed[2]:
        dweight_pwc = _weight_gradient(e, z3, weight_pwc, products3, beta, delta)
    if dx is not None:
        if z is x:
            dx[:, :representative] = dx3
        _pointwise_adjoint(e, weight_pwc, dx[:, :representative], accumulate=z is x)
    if dx is not None or (needed[3] and products1 is None):
        e = torch.addcmul(-delta, g, gamma, out=scratch).to(x.dtype)
    if needed[3]:
        dweight_redundant = _weight_gradient(e, z1, weight_redundant, products1, gamma, -delta)
    if dx is not None:
        _pointwise_adjoint(e, weight_redundant, dx[:, representative:])
        if z is not x:
            dx = native.pointwise_input_adjoint(dx, (x.shape[2], x.shape[3]), geometry)
            dx[:, :representative] += dx3
    return dx, dweight_gwc, dweight_pwc, dweight_redundant, dbias, dbranch_bias


def _weight_gradient(
    e: Tensor, z: Tensor, weight: Tensor, products: Tensor | None, gate: Tensor, delta: Tensor
) -> Tensor:
    """Sum over samples and pixels of e z^T with e = gate g + delta, in the shape of ``weight``.

    Args:
        e: [N, M, H, W]; not read where ``products`` are.
        z: [N, C, H, W].
        products: the sums of g z^T over the pixels of each sample, [N, M, C], or None.
        gate, delta: [N, M, 1, 1].
    """
    if products is not None:
        gradient = (products * gate[:, :, 0]).sum(0)
        return gradient.addmm_(delta.flatten(1).T, pixels(z).sum(1)).view_as(weight)
    if is_matrix_product(z):
        return (rows(e).T @ rows(z)).view_as(weight)
    return _convolution_backward(e, z, weight, (False, True))[1]


def _pointwise_adjoint(e: Tensor, weight: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """W^T e into ``out``, or added to it: e [N, M, H, W], weight [M, C, 1, 1] -> [N, C, H, W]."""
    if is_matrix_product(e):
        if accumulate:
            rows(out).addmm_(rows(e), weight.flatten(1))
        else:
            torch.mm(rows(e), weight.flatten(1), out=rows(out))
        return
    y = F.conv2d(e, weight.transpose(0, 1).contiguous())
    if accumulate:
        out += y
    else:
        out.copy_(y)


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    needed: tuple[bool, ...],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> tuple[Any, Any]:
    """Gradients of ``F.conv2d(x, weight, None, stride, ...)`` by ``x`` and ``weight``, where ``needed``."""
    x, weight = readable(x, weight, stride, padding, dilation)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (*needed, False)
    )[:2]


def differentiable_gradients(inputs: list[Any], geometry: Geometry, grad: Tensor) -> tuple[Tensor | None, ...]:
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
