"""The backward through weight gradients of single samples, without a map of U3 - U1.

With g alone in the place of E3 and E1, the weight gradients of sample n are

    Gg_n = g_n (*) x3_n  [M, alpha L / G, k, k],        G_n = g_n z_n^T  [M, L],

and since the branches are linear in their weights, and E3 and E1 in g and 1, all that the backward needs of U3, U1, E1
and the sums over the batch follows from them:

    A_n = sum Wg Gg_n + sum Wp G_n3 - sum W1 G_n1                                         over all but M
    dWg = sum_n beta_n Gg_n + shift_n T_n         T_n[c, i, j] = sum of x3_n over the pixels that tap (i, j) reads
    dWp = sum_n beta_n G_n3 + shift_n sum z3_n
    dW1 = sum_n gamma_n G_n1 - shift_n sum z1_n

That is one grouped and one point-wise convolution less than through maps, for passes over Gg_n that cost as much as
that convolution does on about a hundred pixels. Where oneDNN is wider than ATen so it is of a batch of one sample,
whose weight gradients are a call each; of more, calls for every sample take longer. Where they pay so do point-wise
weights scaled by the gate of every sample, as in the forward:

    dx = GWC^T(E3) + pool^T([beta_n Wp | gamma_n W1]^T g_n + [Wp | -W1]^T shift_n)

Formulas: :mod:`spconv_triton.native.backward`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import branches, products
from .backward_operands import Operands
from .convolution import HAS_AVX512, channels_last, convolve
from .convolution_backward import convolution_backward
from .gate import gate_comes_first, sums_of_maps
from .products import can_be_matrix_product, is_matrix_product, pixels


class Products(NamedTuple):
    """Weight gradients by g alone, in the gate's dtype.

    Attributes:
        gated: sum_n beta_n Gg_n, [M, k k alpha L / G] in the order of taps; None where not made.
        pointwise: G_n, [N, M, L].
        weight: [Wp | -W1], [M, L].
    """

    gated: Tensor | None
    pointwise: Tensor
    weight: Tensor


PASSES = 150 if HAS_AVX512 else 75
"""The passes over Gg_n take as long as convolving so many pixels, and those over G_n likewise."""

SINGLE_PRODUCT = 8e6
"""Multiply-accumulates of the point-wise convolutions from which this way takes less time of one sample by oneDNN."""

CALLS = 10e6
"""What is called for every sample takes as long as so many multiply-accumulates of the group-wise convolution."""


def pay(given: Operands) -> bool:
    """Whether this way takes less time than that through maps."""
    batch, outputs, height, width = given.g.shape
    if _is_single(given):
        multiplies = given.z.numel() * outputs
        return height * width > PASSES and multiplies > SINGLE_PRODUCT and can_be_matrix_product(given.x)
    if not is_matrix_product(given.x, given.x.shape[1] * outputs):
        return False
    return gate_comes_first(given.x, given.geometry) or (height * width > PASSES and batch > 1 and _is_precise(given))


def gwc_pays(given: Operands) -> bool:
    """Whether Gg_n do; else the group-wise convolution is done again, and G_n serve the point-wise ones alone."""
    more = given.g.shape[2] * given.g.shape[3] - PASSES
    return _is_precise(given) and more * given.weight_gwc.numel() > (0 if _is_single(given) else CALLS)


def _is_single(given: Operands) -> bool:
    """Whether it is one sample, all of whose convolutions are oneDNN's."""
    return given.g.shape[0] == 1 and products.ONEDNN_IS_WIDER and given.g.dtype == torch.float32


def _is_precise(given: Operands) -> bool:
    """Not of bfloat16, whose products take half of the time, and passes over what they make in float32 do not."""
    return given.g.dtype == given.beta.dtype


def gate_gradient(given: Operands, *, of_gwc: bool) -> tuple[Tensor, Products]:
    """A, [N, M, 1, 1], and the products that it came from; Gg_n among them only if ``of_gwc``."""
    x3, z, g, weight_gwc, window = given.x3, given.z, given.g, given.weight_gwc, given.geometry[1:]
    weight_pointwise = torch.cat((given.weight_pwc.flatten(1), -given.weight_redundant.flatten(1)), 1)
    if _is_single(given):
        of_weight = convolution_backward(g, z, weight_pointwise[:, :, None, None], (False, True))[1]
        pointwise = of_weight.flatten(1)[None]
    else:
        pointwise = torch.bmm(pixels(g).transpose(1, 2), pixels(z)).to(given.beta.dtype)
    a = torch.linalg.vecdot(pointwise, weight_pointwise.to(pointwise.dtype))
    if not (of_gwc and gwc_pays(given)):
        gwc = convolve(x3, weight_gwc, None, *window)
        return sums_of_maps(gwc.mul_(g)).add_(a[:, :, None, None]), Products(None, pointwise, weight_pointwise)
    weight, gated = _taps(weight_gwc), None
    samples = zip(x3.split(1), g.split(1), given.beta.flatten(1).unbind(), strict=True)
    for n, (sample, grad, gate) in enumerate(samples):
        product = _taps(convolution_backward(grad, sample, weight_gwc, (False, True), *window)[1])
        a[n].add_(torch.linalg.vecdot(product, weight))
        gated = product.mul_(gate[:, None]) if gated is None else gated.addcmul_(product, gate[:, None])
    return a[:, :, None, None], Products(gated, pointwise, weight_pointwise)


def gradients(
    given: Operands, made: Products, shift: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and the three weights, where ``needed``; ``shift`` is delta / P, [N, M, 1, 1]."""
    of_planes = shift.flatten(1)
    dx = dx3 = dweight_gwc = dweight_pwc = dweight_redundant = None
    if made.gated is not None:
        dweight_gwc = _gwc_gradient(given, made.gated, of_planes)
    through_gwc = (needed[0], needed[1] and made.gated is None)
    if any(through_gwc):
        e3 = torch.addcmul(shift.to(given.g.dtype), given.g, given.beta.to(given.g.dtype))
        dx3, gradient = convolution_backward(e3, given.x3, given.weight_gwc, through_gwc, *given.geometry[1:])
        dweight_gwc = gradient if dweight_gwc is None else dweight_gwc
        del e3  # before the next map of its size
    if needed[2] or needed[3]:
        sums = sums_of_maps(given.z).flatten(1)
        parts = given.x3.shape[1], given.weight_redundant.shape[1]
        sums3, sums1 = sums.split(parts, 1)
        of3, of1 = made.pointwise.split(parts, 2)
        if needed[2]:
            dweight_pwc = _gated_sum(of3, given.beta).addmm_(of_planes.T, sums3)
            dweight_pwc = dweight_pwc.view_as(given.weight_pwc).to(given.x.dtype)
        if needed[3]:
            dweight_redundant = _gated_sum(of1, given.gamma).addmm_(of_planes.T, sums1, alpha=-1)
            dweight_redundant = dweight_redundant.view_as(given.weight_redundant).to(given.x.dtype)
    if needed[0]:
        dx = _input_gradient(given, made.weight, dx3, of_planes)
    return dx, dweight_gwc, dweight_pwc, dweight_redundant


def _gated_sum(of_samples: Tensor, gate: Tensor) -> Tensor:
    """sum_n gate_n of_samples_n of [N, M, L] and [N, M, 1, 1]."""
    gated = of_samples * gate.squeeze(3)
    return gated.squeeze(0) if gated.shape[0] == 1 else gated.sum(0)


def _taps(weight: Tensor) -> Tensor:
    """[M, C, k, k] as [M, k k C]: a view in channels_last, which is what oneDNN returns for it."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _gwc_gradient(given: Operands, gated: Tensor, shift: Tensor) -> Tensor:
    """``gated`` + sum_n shift_n T_n in the shape of the group-wise weight; ``shift`` is [N, M]."""
    outputs, channels, kh, kw = given.weight_gwc.shape
    groups = given.geometry.groups
    sums = _sums_under_taps(given).view(-1, kh * kw, groups, channels).permute(2, 0, 1, 3).flatten(2)
    shifts = shift.view(-1, groups, outputs // groups).permute(1, 2, 0)
    gated.view(groups, outputs // groups, -1).baddbmm_(shifts, sums)
    return gated.view(outputs, kh, kw, channels).permute(0, 3, 1, 2)


def _sums_under_taps(given: Operands) -> Tensor:
    """T: sums of x3 over the pixels that each tap reads, [N, k, k, alpha L]."""
    x3, (_, _, *out) = given.x3, given.g.shape
    batch, channels, *size = x3.shape
    taps = zip(*given.geometry[:4], size, out, strict=True)
    rows, columns = (_read_by_taps(*axis, x3.dtype, x3.device) for axis in taps)
    of_rows = torch.bmm(rows.expand(batch, -1, -1), x3.permute(0, 2, 3, 1).flatten(2)).view(-1, size[1], channels)
    sums = torch.bmm(columns.expand(of_rows.shape[0], -1, -1), of_rows)
    return sums.view(batch, rows.shape[0], columns.shape[0], channels)


@functools.lru_cache(maxsize=64)
def _read_by_taps(
    kernel: int, stride: int, padding: int, dilation: int, size: int, out: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[kernel, size]: 1 where a tap reads a position at any of ``out`` output positions along an axis, else 0."""
    read = torch.zeros(kernel, size, dtype=dtype, device="cpu")
    for tap in range(kernel):
        start = tap * dilation - padding
        first = max(0, -(start // stride))
        read[tap, start + first * stride : max(0, start + (out - 1) * stride + 1) : stride] = 1
    return read.to(device)


def _input_gradient(given: Operands, weight: Tensor, dx3: Any, shift: Tensor) -> Tensor:
    """dL/dx, [N, L, H, W].

    Args:
        weight: [Wp | -W1], [M, L].
        dx3: GWC^T(E3).
        shift: delta / P, [N, M].
    """
    x, x3, z, g, beta, gamma, _, weight_pwc, weight_redundant, geometry = given
    representative, redundant = x3.shape[1], weight_redundant.shape[1]
    of3, of1 = weight_pwc.flatten(1) * beta.squeeze(3), weight_redundant.flatten(1) * gamma.squeeze(3)
    weights = torch.cat((of3, of1), 2).to(g.dtype)
    constants = torch.mm(shift, weight.to(shift.dtype))[:, None].to(g.dtype)
    if _is_single(given):
        dz = channels_last(convolution_backward(g, z, weights[0, :, :, None, None], (True, False))[0])
        dz += constants.mT[..., None]
        if z is x:
            dz[:, :representative] += dx3
    else:
        dz = torch.empty_like(z)
        dz3, dz1 = pixels(dz).split((representative, redundant), 2)
        constant3, constant1 = constants.split((representative, redundant), 2)
        if z is x:
            torch.add(pixels(channels_last(dx3)), constant3, out=dz3)
        else:
            dz3.copy_(constant3.expand_as(dz3))
        dz1.copy_(constant1.expand_as(dz1))
        pixels(dz).baddbmm_(pixels(g), weights)
    if z is x:
        return dz
    dx = branches.pointwise_input_adjoint(dz, (x.shape[2], x.shape[3]), geometry)
    dx[:, :representative] += dx3
    return dx
