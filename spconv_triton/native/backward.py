"""The backward of the whole layer on ATen.

Let g = dL/dY, P the number of output pixels, d = S3 - S1 and per (sample, output channel)

    A     = sum_pixels g (U3 - U1)
    delta = beta gamma A                dL/dS3 = -dL/dS1, which the GAP's gradient spreads evenly:
    E3    = dL/dU3 = beta g + shift     shift = delta / P
    E1    = dL/dU1 = gamma g - shift

and everything else is linear in E3 and E1, with z the input of the point-wise convolutions (x, pooled at a stride):

    dx3 = GWC^T(E3) + pool^T(Wp^T E3)             dx1 = pool^T(W1^T E1)
    dWg = E3 (*) x3,   dWp = E3 z3^T,   dW1 = E1 z1^T,   db3 = sum E3,   db1 = sum E1

Of U3 and U1 at most the difference was kept (:func:`spconv_triton.set_recompute`). It is taken as it is or made again
(:mod:`spconv_triton.native.backward_maps`, with few channels :mod:`spconv_triton.native.backward_merged`), or A comes
from the weight gradients of single samples (:mod:`spconv_triton.native.backward_products`).

gamma is sigmoid(-d), not 1 - beta, and E1 is not g - E3: where the gate is saturated they would be all rounding error.

A batch of many samples goes backward in parts, as it went forward (:mod:`spconv_triton.native.parts`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..geometry import Geometry
from ..layout import gradient_of
from ..optional_arguments import of_present, spread
from . import backward_maps, backward_merged, backward_products
from .backward_maps import Maps
from .backward_merged import Merged
from .backward_operands import Operands, operands
from .backward_products import Products
from .gate import bias_difference, sums_of_maps
from .parts import parts_of, pay_in_training, samples_together


def gradients(
    inputs: list[Any],
    geometry: Geometry,
    d: Tensor,
    grad: Tensor,
    needed: tuple[bool, ...],
    difference: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the six tensor arguments of :func:`spconv_triton.native.onepass.spconv2d`, where ``needed``.

    Args:
        inputs: those arguments; the redundant part is there.
        d: S3 - S1 of the forward, [N, M, 1, 1], float32 or better.
        grad: dL/dY, [N, M, H_out, W_out].
        difference: U3 - U1 without biases, likewise; None to compute it again.

    Returns:
        Six tensors of the arguments' shapes and dtypes, None where not needed.
    """
    x, *others = inputs
    samples = samples_together(x, grad.shape[1], (grad.shape[2], grad.shape[3]))
    if samples >= x.shape[0] or not pay_in_training(x.dtype):
        dx, *sums = _of_part(inputs, geometry, d, grad, needed, difference)
    else:
        dx = torch.empty_like(x, memory_format=torch.channels_last) if needed[0] else None
        parts = zip(x.split(samples), d.split(samples), grad.split(samples), strict=True)
        kept, outs = (parts_of(maps, samples, x.shape[0]) for maps in (difference, dx))
        sums = [None] * len(others)
        for (of_x, of_d, of_grad), of_kept, out in zip(parts, kept, outs, strict=True):
            of_others = _of_part([of_x, *others], geometry, of_d, of_grad, needed, of_kept, out)[1:]
            sums = [_plus(total, of_part, d.dtype) for total, of_part in zip(sums, of_others, strict=True)]
    return dx, *map(gradient_of, others, sums)


def _plus(total: Tensor | None, of_part: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A sum over parts in the gate's dtype, in the memory of the first part where that has it."""
    if of_part is None:
        return None
    return of_part.to(dtype) if total is None else total.add_(of_part)


def _of_part(
    inputs: list[Any],
    geometry: Geometry,
    d: Tensor,
    grad: Tensor,
    needed: tuple[bool, ...],
    difference: Tensor | None,
    out: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of samples that go backward together; that of x is written into ``out``, if it is given. Those of
    the biases are in the gate's dtype."""
    x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias = inputs
    given = operands(x, weight_gwc, weight_pwc, weight_redundant, geometry, d, grad)
    g, beta, gamma = given.g, given.beta, given.gamma
    a, made = _gate_gradient(given, difference, needed)
    dbias = dbranch_bias = None
    if bias is not None or branch_bias is not None:
        total = sums_of_maps(g)
        if bias is not None:
            dbias = total.sum((0, 2, 3))
        if branch_bias is not None:
            a += total * bias_difference(branch_bias, d.dtype)
            to_s3 = beta * gamma * a
            dbranch_bias = torch.stack(((beta * total + to_s3).sum((0, 2, 3)), (gamma * total - to_s3).sum((0, 2, 3))))
    shift = beta * gamma * a / (g.shape[2] * g.shape[3])
    if isinstance(made, Merged):
        of_layer = backward_merged.gradients(given, made, shift, needed)
    elif isinstance(made, Products):
        of_layer = backward_products.gradients(given, made, shift, needed)
    else:
        of_layer = backward_maps.gradients(given, made, shift, needed, out)
    dx = of_layer[0]
    if out is not None and dx is not None and dx is not out:
        out.copy_(dx)
    return (*of_layer, dbias, dbranch_bias)


def _gate_gradient(
    given: Operands, difference: Tensor | None, needed: tuple[bool, ...]
) -> tuple[Tensor, Merged | Products | Maps]:
    """A, [N, M, 1, 1], and what was made for it."""
    if backward_merged.pays(given):
        a, merged = backward_merged.gate_gradient(given, difference)
        if math.isfinite(a.sum()):  # else the zeros among merged weights make NaN of infinities
            return a, merged
    if difference is None and backward_products.pay(given):
        return backward_products.gate_gradient(given, of_gwc=needed[1])
    return backward_maps.gate_gradient(given, difference)


def differentiable_gradients(
    layer: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients where they will themselves be differentiated: by the chain rule through ``layer``, which computes
    Y from ``inputs`` part by part."""
    present, function = of_present(layer, inputs)
    pullback = torch.func.vjp(function, *(inputs[i] for i in present))[1]
    return tuple(spread(pullback(grad), present, len(inputs)))
