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
    _, x3, z, g, _, _, gwc, pwc, redundant, geometry = given
    convolved, blocks, is_folded = _folded(given)
    if is_folded:
        scratch = convolve(x3, convolved, None, *geometry[1:])
        for block in blocks:
            read, written = columns(z, block.input, block.inputs), columns(scratch, block.output, block.outputs)
            written.addmm_(read, block.of(pwc).t())
        add_pointwise(scratch, z, -redundant, pwc.shape[1])
    else:
        scratch = add_convolution(pointwise(z, torch.cat((pwc, -redundant), 1)), x3, gwc, *geometry[1:])
    return sums_of_maps(scratch.mul_(g)), Maps(scratch, convolved, blocks, is_folded)


def _folded(given: Operands) -> tuple[Tensor, tuple[Block, ...], bool]:
    """The weight of the group-wise convolution, the blocks of Wp that are not in it, and whether any are."""
    gwc, pwc, geometry = given.weight_gwc, given.weight_pwc, given.geometry
    if is_matrix_product(given.x3) and folding_pays(given.x, gwc, geometry):
        return fold(gwc, pwc, geometry), other_blocks(gwc, geometry.groups), True
    return gwc, whole(pwc), False


def gradients(
    given: Operands, made: Maps, delta: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and the three weights, where ``needed``; ``delta`` is [N, M, 1, 1]."""
    x, g = given.x, given.g
    delta, beta, gamma = (gate.to(g.dtype) for gate in (delta, given.beta, given.gamma))
    e3 = torch.addcmul(delta, g, beta, out=made.scratch).to(x.dtype)
    dx = torch.empty_like(given.z) if needed[0] else None
    dx3, dweight_gwc, dweight_pwc = _representative_gradients(given, made, e3, dx, needed)
    dweight_redundant = None
    if needed[0] or needed[3]:
        e1 = torch.addcmul(-delta, g, gamma, out=made.scratch).to(x.dtype)
        dweight_redundant = _redundant_gradients(given, e1, dx, needed)
    return _input_gradient(given, dx, dx3), dweight_gwc, dweight_pwc, dweight_redundant


def branch_gradients(
    given: Operands, e3: Tensor, e1: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and the three weights, where ``needed``, from dL/dU3 and dL/dU1, [N, M, H_out, W_out]."""
    dx = torch.empty_like(given.z) if needed[0] else None
    dx3, dweight_gwc, dweight_pwc = _representative_gradients(given, Maps(e3, *_folded(given)), e3, dx, needed)
    dweight_redundant = _redundant_gradients(given, e1, dx, needed)
    return _input_gradient(given, dx, dx3), dweight_gwc, dweight_pwc, dweight_redundant


def _representative_gradients(
    given: Operands, made: Maps, e: Tensor, dz: Tensor | None, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """GWC^T(E3) and the gradients of Wg and Wp; Wp^T E3 goes into ``dz``, with GWC^T(E3) where z is x."""
    _, convolved, blocks, is_folded = made
    dx3 = dconvolved = dweight_pwc = None
    through = needed[0], needed[1] or (needed[2] and is_folded)
    if any(through):
        dx3, dconvolved = convolution_backward(e, given.x3, convolved, through, *given.geometry[1:])
    if needed[2]:
        dweight_pwc = torch.empty_like(given.weight_pwc)
        for block in blocks:
            _weight_gradient(e, given.z, block, block.of(dweight_pwc))
        if is_folded and dconvolved is not None:
            unfold_gradient(dconvolved, dweight_pwc, given.geometry)
    if dz is not None:
        assert dx3 is not None
        of_representative = dz.narrow(1, 0, given.x3.shape[1])
        if given.z is given.x:
            of_representative.copy_(dx3)
        else:
            of_representative.zero_()
        for block in blocks:
            _adjoint(e, block.of(given.weight_pwc), block, dz, accumulate=True)
    return dx3, dconvolved if needed[1] else None, dweight_pwc


def _redundant_gradients(given: Operands, e: Tensor, dz: Tensor | None, needed: tuple[bool, ...]) -> Tensor | None:
    """The gradient of W1; W1^T E1 goes into ``dz``."""
    weight, dweight = given.weight_redundant, None
    block = Block(0, weight.shape[0], given.x3.shape[1], weight.shape[1])
    if needed[3]:
        dweight = torch.empty_like(weight)
        _weight_gradient(e, given.z, block, dweight.flatten(1))
    if dz is not None:
        _adjoint(e, weight.flatten(1), block, dz)
    return dweight


def _input_gradient(given: Operands, dz: Tensor | None, dx3: Tensor | None) -> Tensor | None:
    """Of x, from that of z, and GWC^T(E3) where that is not in it."""
    if dz is None or given.z is given.x:
        return dz
    assert dx3 is not None
    dx = native.pointwise_input_adjoint(dz, (given.x.shape[2], given.x.shape[3]), given.geometry)
    dx[:, : given.x3.shape[1]] += dx3
    return dx


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
