"""The backward through maps: U3 - U1 = GWC(x3) + [Wp, -W1] z is made again, for A = sum_pixels g (U3 - U1).

Then E3 and E1 are written over it, one after the other. Formulas: :mod:`spconv_triton.native_backward`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .native_backward_operands import Operands
from .native_convolution import (
    add_convolution,
    add_pointwise,
    columns,
    convolution_backward,
    convolve,
    is_matrix_product,
    pointwise,
)
from .native_folding import Block, fold, folding_pays, other_blocks, unfold_gradient, whole
from .native_gate import sums_of_maps


class Maps(NamedTuple):
    """What :func:`gradients` goes on with.

    Attributes:
        scratch: a map that is no longer used, [N, M, H_out, W_out].
        convolved: the weight of the group-wise convolution: the layer's, or with blocks of Wp folded into it.
        blocks: those of Wp that are not in ``convolved``.
        is_folded: whether there are any in it.
    """

    scratch: Tensor
    convolved: Tensor
    blocks: tuple[Block, ...]
    is_folded: bool


def gate_gradient(given: Operands) -> tuple[Tensor, Maps]:
    """A, [N, M, 1, 1], and what was made for it."""
    x, x3, z, g, _, _, gwc, pwc, redundant, geometry = given
    is_folded = is_matrix_product(x3) and folding_pays(x, gwc, geometry)
    if is_folded:
        convolved, blocks = fold(gwc, pwc, geometry), other_blocks(gwc, geometry.groups)
        scratch = convolve(x3, convolved, None, *geometry[1:])
        for block in blocks:
            read, written = columns(z, block.input, block.inputs), columns(scratch, block.output, block.outputs)
            written.addmm_(read, block.of(pwc).t())
        add_pointwise(scratch, z, -redundant, pwc.shape[1])
    else:
        convolved, blocks = gwc, whole(pwc)
        scratch = add_convolution(pointwise(z, torch.cat((pwc, -redundant), 1)), x3, gwc, *geometry[1:])
    return sums_of_maps(scratch.mul_(g)), Maps(scratch, convolved, blocks, is_folded)


def gradients(
    given: Operands, made: Maps, delta: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and the three weights, where ``needed``; ``delta`` is [N, M, 1, 1]."""
    scratch, convolved, blocks, is_folded = made
    x, x3, z, g, beta, gamma, _, weight_pwc, weight_redundant, geometry = given
    representative = x3.shape[1]
    of_redundant = Block(0, g.shape[1], representative, weight_redundant.shape[1])
    dconvolved = dweight_pwc = dweight_redundant = None
    dx = torch.empty_like(z) if needed[0] else None  # of z, as yet
    delta, beta, gamma = (gate.to(g.dtype) for gate in (delta, beta, gamma))
    e = torch.addcmul(delta, g, beta, out=scratch).to(x.dtype)
    through = needed[0], needed[1] or (needed[2] and is_folded)
    if any(through):
        dx3, dconvolved = convolution_backward(e, x3, convolved, through, *geometry[1:])
    if needed[2]:
        dweight_pwc = torch.empty_like(weight_pwc)
        for block in blocks:
            _weight_gradient(e, z, block, block.of(dweight_pwc))
        if is_folded and dconvolved is not None:
            unfold_gradient(dconvolved, dweight_pwc, geometry)
    if dx is not None:
        of_representative = dx.narrow(1, 0, representative)
        if z is x:
            of_representative.copy_(dx3)
        else:
            of_representative.zero_()
        for block in blocks:
            _adjoint(e, block.of(weight_pwc), block, dx, accumulate=True)
    if dx is not None or needed[3]:
        e = torch.addcmul(-delta, g, gamma, out=scratch).to(x.dtype)
    if needed[3]:
        dweight_redundant = torch.empty_like(weight_redundant)
        _weight_gradient(e, z, of_redundant, dweight_redundant.flatten(1))
    if dx is not None:
        _adjoint(e, weight_redundant.flatten(1), of_redundant, dx)
        if z is not x:
            dx = native.pointwise_input_adjoint(dx, (x.shape[2], x.shape[3]), geometry)
            dx[:, :representative] += dx3
    return dx, dconvolved if needed[1] else None, dweight_pwc, dweight_redundant


def _weight_gradient(e: Tensor, z: Tensor, block: Block, out: Tensor) -> None:
    """e z^T over samples and pixels, of the block's outputs and inputs, into ``out``: [outputs, inputs].

    Args:
        e: [N, M, H, W].
        z: [N, L, H, W].
    """
    output, outputs, first, inputs = block
    if is_matrix_product(z):
        torch.mm(columns(e, output, outputs).t(), columns(z, first, inputs), out=out)
        return
    weight = e.new_empty(outputs, inputs, 1, 1)
    of_e, of_z = e.narrow(1, output, outputs), z.narrow(1, first, inputs)
    out.copy_(convolution_backward(of_e, of_z, weight, (False, True))[1].flatten(1))


def _adjoint(e: Tensor, weight: Tensor, block: Block, dz: Tensor, *, accumulate: bool = False) -> None:
    """W^T e of the block's outputs, into or added to its inputs in ``dz``: e [N, M, H, W], weight [outputs, inputs]."""
    output, outputs, first, inputs = block
    if is_matrix_product(e):
        read, written = columns(e, output, outputs), columns(dz, first, inputs)
        written.addmm_(read, weight) if accumulate else torch.mm(read, weight, out=written)
        return
    y = F.conv2d(e.narrow(1, output, outputs), weight.t()[:, :, None, None].contiguous())
    written = dz.narrow(1, first, inputs)
    written.add_(y) if accumulate else written.copy_(y)
