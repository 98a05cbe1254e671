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
    columns,
    convolution_backward,
    convolve,
    is_matrix_product,
    pointwise,
    rows,
)
from .native_folding import unfold_gradient
from .native_gate import sums_of_maps


def gate_gradient(given: Operands) -> tuple[Tensor, Tensor]:
    """A, [N, M, 1, 1], and a map that is no longer used, [N, M, H_out, W_out]."""
    x3, z, window = given.x3, given.z, given.geometry[1:]
    if given.is_folded:
        scratch = convolve(x3, given.convolved, None, *window)
        for block in given.blocks:
            read, written = columns(z, block.input, block.inputs), columns(scratch, block.output, block.outputs)
            written.addmm_(read, block.of(given.weight_pwc).t())
        weight = given.weight_redundant.flatten(1)
        rows(scratch).addmm_(columns(z, given.weight_pwc.shape[1], weight.shape[1]), weight.t(), alpha=-1)
    else:
        difference = torch.cat((given.weight_pwc, -given.weight_redundant), 1)
        scratch = add_convolution(pointwise(z, difference), x3, given.convolved, *window)
    return sums_of_maps(scratch.mul_(given.g)), scratch


def gradients(
    given: Operands, scratch: Tensor, delta: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and the three weights, where ``needed``; ``delta`` is [N, M, 1, 1]."""
    x, x3, z, g, beta, gamma, convolved, blocks, weight_pwc, weight_redundant, geometry = given
    representative = x3.shape[1]
    dconvolved = dweight_pwc = dweight_redundant = None
    dx = torch.empty_like(z) if needed[0] else None  # of z, as yet
    delta, beta, gamma = (gate.to(g.dtype) for gate in (delta, beta, gamma))
    e = torch.addcmul(delta, g, beta, out=scratch).to(x.dtype)
    through = needed[0], needed[1] or (needed[2] and given.is_folded)
    if any(through):
        dx3, dconvolved = convolution_backward(e, x3, convolved, through, *geometry[1:])
    if needed[2]:
        dweight_pwc = torch.empty_like(weight_pwc)
        for block in blocks:
            of_e, of_z = e.narrow(1, block.output, block.outputs), z.narrow(1, block.input, block.inputs)
            block.of(dweight_pwc).copy_(_weight_gradient(of_e, of_z))
        if given.is_folded and dconvolved is not None:
            unfold_gradient(dconvolved, dweight_pwc, geometry)
    if dx is not None:
        of_representative = dx.narrow(1, 0, representative)
        if z is x:
            of_representative.copy_(dx3)
        else:
            of_representative.zero_()
        for block in blocks:
            of_e, of_z = e.narrow(1, block.output, block.outputs), dx.narrow(1, block.input, block.inputs)
            _pointwise_adjoint(of_e, block.of(weight_pwc), of_z, accumulate=True)
    if dx is not None or needed[3]:
        e = torch.addcmul(-delta, g, gamma, out=scratch).to(x.dtype)
    if needed[3]:
        redundant = z.narrow(1, representative, weight_redundant.shape[1])
        dweight_redundant = _weight_gradient(e, redundant).view_as(weight_redundant)
    if dx is not None:
        _pointwise_adjoint(e, weight_redundant.flatten(1), dx[:, representative:])
        if z is not x:
            dx = native.pointwise_input_adjoint(dx, (x.shape[2], x.shape[3]), geometry)
            dx[:, :representative] += dx3
    return dx, dconvolved if needed[1] else None, dweight_pwc, dweight_redundant


def _weight_gradient(e: Tensor, z: Tensor) -> Tensor:
    """e z^T over samples and pixels, [M, C]: e [N, M, H, W], z [N, C, H, W]."""
    if is_matrix_product(z):
        return rows(e).T @ rows(z)
    weight = e.new_empty(e.shape[1], z.shape[1], 1, 1)
    return convolution_backward(e, z, weight, (False, True))[1].flatten(1)


def _pointwise_adjoint(e: Tensor, weight: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """W^T e into ``out``, or added to it: e [N, M, H, W], weight [M, C] -> [N, C, H, W]."""
    if is_matrix_product(e):
        if accumulate:
            rows(out).addmm_(rows(e), weight)
        else:
            torch.mm(rows(e), weight, out=rows(out))
        return
    y = F.conv2d(e, weight.t()[:, :, None, None].contiguous())
    if accumulate:
        out += y
    else:
        out.copy_(y)
