"""The backward of a layer of few channels: U3 - U1 = GWC'(x3) - W1 z1, with GWC' merged of the weights of x3.

One map as in :mod:`spconv_triton.native.backward_maps`, in as few calls as there can be. Formulas:
:mod:`spconv_triton.native.backward`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import branches
from .backward_operands import Operands
from .convolution import channels_last, convolve
from .convolution_backward import convolution_backward
from .folding import merge, merging_pays, part_gradient
from .gate import sums_of_maps
from .products import can_be_matrix_product


class Merged(NamedTuple):
    """What :func:`gradients` goes on with.

    Attributes:
        scratch: a map that is no longer used, [N, M, H_out, W_out].
        weight: of the convolution of x3, [M, alpha L, k, k].
        z1: the redundant channels of z.
    """

    scratch: Tensor
    weight: Tensor
    z1: Tensor


def pays(given: Operands) -> bool:
    """Whether this way takes less time than the others; not where operations are counted."""
    return merging_pays(given.x, given.weight_gwc, given.geometry) and can_be_matrix_product(given.x)


def gate_gradient(given: Operands, difference: Tensor | None) -> tuple[Tensor, Merged]:
    """A, [N, M, 1, 1], and what was made for it; from U3 - U1, if that is given."""
    _, stride, padding, dilation, _ = given.geometry
    weight = merge(given.weight_gwc, given.weight_pwc, given.geometry)
    z1 = channels_last(given.z.narrow(1, given.x3.shape[1], given.weight_redundant.shape[1]))
    if difference is None:
        scratch = convolve(given.x3, weight, None, stride, padding, dilation)
        scratch -= F.conv2d(z1, given.weight_redundant)
        scratch *= given.g
    else:
        scratch = difference * given.g
    return sums_of_maps(scratch), Merged(scratch, weight, z1)


def gradients(
    given: Operands, made: Merged, shift: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and the three weights, where ``needed``; ``shift`` is delta / P, [N, M, 1, 1]."""
    _, stride, padding, dilation, _ = given.geometry
    dx = dx3 = dz1 = dweight_gwc = dweight_pwc = dweight_redundant = None
    through = needed[0], needed[1] or needed[2]
    if any(through):
        e3 = torch.addcmul(shift, given.g, given.beta, out=made.scratch)
        dx3, merged = convolution_backward(e3, given.x3, made.weight, through, stride, padding, dilation)
        if through[1]:
            dweight_gwc, dweight_pwc = part_gradient(merged, given.geometry)
    if needed[0] or needed[3]:
        e1 = torch.addcmul(-shift, given.g, given.gamma, out=made.scratch)
        dz1, dweight_redundant = convolution_backward(e1, made.z1, given.weight_redundant, (needed[0], needed[3]))
    if needed[0]:
        assert dx3 is not None
        assert dz1 is not None
        if given.z is not given.x:
            dz1 = branches.pointwise_input_adjoint(dz1, (given.x.shape[2], given.x.shape[3]), given.geometry)
        dx = torch.cat((dx3, dz1), 1)
    return dx, dweight_gwc if needed[1] else None, dweight_pwc if needed[2] else None, dweight_redundant
