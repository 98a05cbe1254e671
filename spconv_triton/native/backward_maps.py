"""The backward through maps: U3 - U1 = GWC(x3) + [Wp, -W1] z, kept or made again, for A = sum_pixels g (U3 - U1).

Then E3 and E1 are written over it, one after the other. Formulas: :mod:`spconv_triton.native.backward`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import branches
from .backward_operands import Operands
from .convolution import channels_last, convolve
from .convolution_backward import convolution_backward
from .folding import Block, fold, folding_pays, other_blocks, whole
from .gate import sums_of_maps
from .products import columns, is_matrix_product, plus_pointwise

THIN = 16
"""Input channels of a point-wise convolution, below which its gradients are oneDNN's, not MKL's, from LONG pixels."""

LONG = 1 << 13
"""Pixels over which a weight's gradient sums; see THIN."""


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


def gate_gradient(given: Operands, difference: Tensor | None = None) -> tuple[Tensor, Maps]:
    """A, [N, M, 1, 1], and what was made for it; from U3 - U1, if that is given."""
    _, x3, z, g, _, _, _, pwc, redundant, geometry = given
    convolved, blocks, is_folded = _folded(given)
    if difference is not None:
        scratch = difference * g
        return sums_of_maps(scratch), Maps(scratch, convolved, blocks, is_folded)
    if is_folded:
        scratch = convolve(x3, convolved, None, *geometry[1:])
        for block in blocks:
            read, written = columns(z, block.input, block.inputs), columns(scratch, block.output, block.outputs)
            written.addmm_(read, block.of(pwc).t())
        scratch = plus_pointwise(scratch, z, -redundant, pwc.shape[1])
    else:
        scratch = plus_pointwise(convolve(x3, convolved, None, *geometry[1:]), z, torch.cat((pwc, -redundant), 1))
    return sums_of_maps(scratch.mul_(g)), Maps(scratch, convolved, blocks, is_folded)


def _folded(given: Operands) -> tuple[Tensor, tuple[Block, ...], bool]:
    """The weight of the group-wise convolution, the blocks of Wp that are not in it, and whether any are."""
    gwc, pwc, geometry = given.weight_gwc, given.weight_pwc, given.geometry
    if folding_pays(given.x, gwc, geometry):
        return fold(gwc, pwc, geometry), other_blocks(gwc, geometry.groups), True
    return gwc, whole(pwc), False


def gradients(
    given: Operands, made: Maps, shift: Tensor, needed: tuple[bool, ...], out: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and the three weights, where ``needed``; ``shift`` is delta / P, [N, M, 1, 1].

    That of x is in ``out``, of its shape and dtype in channels_last, if it is given and the stride is 1.
    """
    x, g = given.x, given.g
    shift, beta, gamma = (gate.to(g.dtype) for gate in (shift, given.beta, given.gamma))
    e3 = torch.addcmul(shift, g, beta, out=made.scratch).to(x.dtype)
    dx = None
    if needed[0]:
        dx = out if out is not None and given.z is x else torch.empty_like(given.z)
    dx3, dweight_gwc, dweight_pwc = _representative_gradients(given, made, e3, dx, needed)
    dweight_redundant = None
    if needed[0] or needed[3]:
        e1 = torch.addcmul(-shift, g, gamma, out=made.scratch).to(x.dtype)
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
    """GWC^T(E3) and the gradients of Wg and Wp; Wp^T E3 goes into ``dz``.

    Where z is x so does GWC^T(E3), and is not returned, so that its memory is free.
    """
    _, convolved, blocks, is_folded = made
    dx3 = dconvolved = dweight_pwc = None
    if any(needed[:2]):
        dx3, dconvolved = convolution_backward(e, given.x3, convolved, needed[:2], *given.geometry[1:])
    is_x = given.z is given.x
    read, added = given.x3 if is_x else given.z, channels_last(dx3) if is_x and dx3 is not None else None
    if needed[2]:
        dweight_pwc = torch.empty_like(given.weight_pwc)
        if is_folded:  # in one product, not block by block
            (block,) = whole(dweight_pwc)
            _block_gradients(e, read, block, block.of(given.weight_pwc), block.of(dweight_pwc), None)
    for block in blocks:
        of_block = None if dweight_pwc is None or is_folded else block.of(dweight_pwc)
        _block_gradients(e, read, block, block.of(given.weight_pwc), of_block, dz, added)
    if dz is not None and not blocks:
        of_representative = dz.narrow(1, 0, given.x3.shape[1])
        of_representative.zero_() if added is None else of_representative.copy_(added)
    return None if is_x else dx3, dconvolved if needed[1] else None, dweight_pwc


def _redundant_gradients(given: Operands, e: Tensor, dz: Tensor | None, needed: tuple[bool, ...]) -> Tensor | None:
    """The gradient of W1; W1^T E1 goes into ``dz``."""
    weight = given.weight_redundant.flatten(1)
    dweight = torch.empty_like(weight) if needed[3] else None
    _block_gradients(e, given.z, Block(0, weight.shape[0], given.x3.shape[1], weight.shape[1]), weight, dweight, dz)
    return None if dweight is None else dweight.view_as(given.weight_redundant)


def _input_gradient(given: Operands, dz: Tensor | None, dx3: Tensor | None) -> Tensor | None:
    """Of x, from that of z, and GWC^T(E3) where that is not in it."""
    if dz is None or given.z is given.x:
        return dz
    assert dx3 is not None
    dx = branches.pointwise_input_adjoint(dz, (given.x.shape[2], given.x.shape[3]), given.geometry)
    dx[:, : given.x3.shape[1]] += dx3
    return dx


def _block_gradients(
    e: Tensor,
    z: Tensor,
    block: Block,
    weight: Tensor,
    dweight: Tensor | None,
    dz: Tensor | None,
    added: Tensor | None = None,
) -> None:
    """Of a point-wise convolution of the block's inputs in ``z`` to its outputs in ``e``.

    Args:
        e: gradient by the outputs, [N, M, H, W].
        z: [N, L, H, W].
        weight: [outputs, inputs].
        dweight: what e z^T is written into, of that shape; None for not at all.
        dz: what W^T e is written into, [N, L, H, W]; None for not at all.
        added: of the same inputs, and added to it.
    """
    output, outputs, first, inputs = block
    if is_matrix_product(z, weight.numel()) and not _is_thin(z, inputs):
        of_e = columns(e, output, outputs)
        if dweight is not None:
            torch.mm(of_e.t(), columns(z, first, inputs), out=dweight)
        if dz is not None:
            written = columns(dz, first, inputs)
            if added is None:
                torch.mm(of_e, weight, out=written)
            else:
                written.copy_(columns(added, first, inputs)).addmm_(of_e, weight)
        return
    needed = dz is not None, dweight is not None
    if not any(needed):
        return
    of_e, of_z = e.narrow(1, output, outputs), z.narrow(1, first, inputs)
    through, of_weight = convolution_backward(of_e, of_z, weight[:, :, None, None], needed)
    if dweight is not None:
        dweight.copy_(of_weight.flatten(1))
    if dz is not None:
        written = dz.narrow(1, first, inputs)
        if added is None:
            written.copy_(through)
        else:
            torch.add(through, added.narrow(1, first, inputs), out=written)


def _is_thin(z: Tensor, inputs: int) -> bool:
    """Whether MKL's products with so few channels of ``z`` take longer than a convolution's gradients, copies and all:
    a quarter longer where they sum over ten thousand pixels, three times as long over a hundred thousand."""
    return z.dtype == torch.float32 and inputs < THIN and z.shape[0] * z.shape[2] * z.shape[3] >= LONG
