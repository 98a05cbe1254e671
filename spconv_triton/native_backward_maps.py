"""The backward through maps: U3 - U1 = GWC(x3) + [Wp, -W1] z is made again, for A = sum_pixels g (U3 - U1).

Then E3 and E1 are written over it, one after the other. Formulas: :mod:`spconv_triton.native_backward`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .native_backward_operands import Operands
from .native_convolution import (
    add_convolution,
    convolution_backward,
    is_matrix_product,
    pointwise,
    rows,
)
from .native_gate import sums_of_maps


def gate_gradient(given: Operands) -> tuple[Tensor, Tensor]:
    """A, [N, M, 1, 1], and a map that is no longer used, [N, M, H_out, W_out]."""
    difference = torch.cat((given.weight_pwc, -given.weight_redundant), 1)
    scratch = add_convolution(pointwise(given.z, difference), given.x3, given.weight_gwc, *given.geometry[1:])
    return sums_of_maps(scratch.mul_(given.g)), scratch


def gradients(
    given: Operands, scratch: Tensor, delta: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and the three weights, where ``needed``; ``delta`` is [N, M, 1, 1]."""
    x, x3, z, g, beta, gamma, weight_gwc, weight_pwc, weight_redundant, geometry = given
    representative = x3.shape[1]
    dweight_gwc = dweight_pwc = dweight_redundant = None
    dx = torch.empty_like(z) if needed[0] else None  # of z, as yet
    delta, beta, gamma = (gate.to(g.dtype) for gate in (delta, beta, gamma))
    e = torch.addcmul(delta, g, beta, out=scratch).to(x.dtype)
    if dx is not None or needed[1]:
        dx3, dweight_gwc = convolution_backward(e, x3, weight_gwc, needed[:2], *geometry[1:])
    if needed[2]:
        dweight_pwc = _weight_gradient(e, z[:, :representative], weight_pwc)
    if dx is not None:
        if z is x:
            dx[:, :representative] = dx3
        _pointwise_adjoint(e, weight_pwc, dx[:, :representative], accumulate=z is x)
    if dx is not None or needed[3]:
        e = torch.addcmul(-delta, g, gamma, out=scratch).to(x.dtype)
    if needed[3]:
        dweight_redundant = _weight_gradient(e, z[:, representative:], weight_redundant)
    if dx is not None:
        _pointwise_adjoint(e, weight_redundant, dx[:, representative:])
        if z is not x:
            dx = native.pointwise_input_adjoint(dx, (x.shape[2], x.shape[3]), geometry)
            dx[:, :representative] += dx3
    return dx, dweight_gwc, dweight_pwc, dweight_redundant


def _weight_gradient(e: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """e z^T over samples and pixels, in the shape of ``weight``: e [N, M, H, W], z [N, C, H, W]."""
    if is_matrix_product(z):
        return (rows(e).T @ rows(z)).view_as(weight)
    return convolution_backward(e, z, weight, (False, True))[1]


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
