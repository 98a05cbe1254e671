"""The layer on ATen with a batch norm in each branch, normalising by the batch; keeps x, U3 and little else.

Part by part, autograd keeps U3 and U1, both after their norms, and what the gate makes of them. Here the output is
written over U1, which the backward makes again: that costs a twentieth of a step and leaves as much in memory as
nn.Conv2d and its norm keep; :func:`spconv_triton.set_recompute` says that it is kept instead.

With mu the mean of a branch over the batch, r = 1 / sqrt(variance + eps), and w and b the norm's parameters,

    V = w r (U - mu) + b,    d = mean_p V3 - mean_p V1,    Y = beta V3 + gamma V1 + bias

and in the backward, with g = dL/dY, P the pixels of a sample and K = N P, per (sample, channel)

    B = sum_p g,    T = sum_p g (U - mu) = sum_p g U - mu B,    R = sum_p (U - mu)
    delta = beta gamma (w3 r3 T3 - w1 r1 T1 + (b3 - b1) B)                                    = dL/dd

    db3 = sum_n (beta B + delta),    dw3 = r3 sum_n (beta T3 + delta R3 / P),    dbias = sum_n B
    dL/dU3 = w3 r3 (beta g + delta / P - db3 / K - r3 (U3 - mu3) dw3 / K)

and for U1 with gamma and -delta. From there on they are the gradients of the convolutions
(:mod:`spconv_triton.native.backward_maps`).

Source: Zhang et al., IJCAI 2020, section 3.4; batch norm: Ioffe and Szegedy, ICML 2015, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autocast import computed_dtype, without_autocast
from ..dispatch import needs_plain_backward, needs_plain_operations
from ..geometry import Geometry
from ..layout import gradient_of
from ..recomputation import recomputes
from .backward import differentiable_gradients
from .backward_maps import branch_gradients
from .backward_operands import operands
from .branches import compose_batch_norm
from .convolution import channels_last
from .gate import means_of_maps, sums_of_maps
from .products import pointwise
from .weights import for_one_call

TENSORS = 9
"""x, the three weights, the bias, and weight and bias of either norm: what is differentiated."""

MOST_TOGETHER, WIDEST = 64, 1024
"""How many neighbouring pixels :func:`_variance` takes as channels of one at most, and how many channels those may be:
more of either take longer."""


class Statistics(NamedTuple):
    """Of U3 and U1, in float32 or better.

    Attributes:
        mean: over the batch, [2, M].
        variance: likewise, by N P.
        sample: means of each sample, [2, N, M].
    """

    mean: Tensor
    variance: Tensor
    sample: Tensor


class Branch(NamedTuple):
    """A branch and its norm, over the batch [1, M, 1, 1] and over a sample [N, M, 1, 1].

    Attributes:
        mean: mu.
        reciprocal: r.
        scale: w r.
        shift: b.
        deviation: R / P.
    """

    mean: Tensor
    reciprocal: Tensor
    scale: Tensor
    shift: Tensor
    deviation: Tensor


def spconv2d_batch_norm(
    tensors: Sequence[Any], eps: tuple[float, float], geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Y, mean and variance, as of :func:`.branches.compose_batch_norm`, which computes what this does not."""
    if not takes(tensors[0]) or needs_plain_operations(tensors):
        return compose_batch_norm(tensors, eps, geometry)
    return OnePass.apply(*tensors, eps, geometry)


def takes(x: Tensor) -> bool:
    """Whether a layer on ``x`` takes the one pass: in eager mode on a CPU, in float32 or float64, autocast or not."""
    is_precise = computed_dtype(x) in (torch.float32, torch.float64)
    return x.is_cpu and is_precise and not torch.compiler.is_compiling()


class OnePass(torch.autograd.Function):
    """Y, mean and variance; keeps the tensors that it is given, U3, d and the statistics, and U1 if asked to."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, ctx.eps, ctx.geometry = arguments
        y, u3, u1, d, statistics = forward(tensors, ctx.eps, ctx.geometry)
        ctx.save_for_backward(*tensors, u3, u1, d, *statistics)
        ctx.mark_non_differentiable(statistics.mean, statistics.variance)
        # A view of nothing: autograd forbids an in-place ReLU behind a Function that returns a view.
        return y.data, statistics.mean, statistics.variance

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        tensors, (u3, u1, d, *statistics) = saved[:TENSORS], saved[TENSORS:]
        with without_autocast(grads[0]):
            if needs_plain_backward(grads[0]):
                found = differentiable_gradients(
                    lambda *tensors: compose_batch_norm(tensors, ctx.eps, ctx.geometry)[0], tensors, grads[0]
                )
            else:
                branches = _branches(tensors, Statistics(*statistics), ctx.eps)
                found = gradients(tensors, ctx.geometry, d, grads[0], ctx.needs_input_grad, (u3, u1), branches)
        return (*found, None, None)


def forward(
    tensors: Sequence[Any], eps: tuple[float, float], geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Statistics]:
    """Y, U3, U1, d = S3 - S1 after the norms [N, M, 1, 1], and the statistics. Without gradients.

    Y is in the memory of U1, which then is None, if the backward makes that again.
    """
    x, gwc, pwc, redundant, bias, *_ = tensors
    x = channels_last(x)
    weights = for_one_call(x, gwc, pwc, redundant, geometry)
    z = weights.pointwise_input(x)
    u3, u1 = weights.u3(x, z), weights.u1(z)
    statistics = _statistics(u3, u1)
    if not math.isfinite(statistics.mean.sum()):  # joined weights may make NaN of infinities
        u3 = weights.given.u3(x, z)
        statistics = _statistics(u3, u1)
    three, one = _branches(tensors, statistics, eps)
    d = torch.addcmul(three.shift - one.shift, three.deviation, three.scale).addcmul_(
        one.deviation, one.scale, value=-1
    )
    beta, gamma = torch.sigmoid(d), torch.sigmoid(-d)
    scale3, scale1 = beta * three.scale, gamma * one.scale
    offset = beta * three.shift + gamma * one.shift - scale3 * three.mean - scale1 * one.mean
    if bias is not None:
        offset += bias.detach()[:, None, None]
    kept = None if recomputes() else u1
    y = torch.addcmul(offset, u1, scale1, out=u1 if kept is None else torch.empty_like(u1)).addcmul_(u3, scale3)
    return y, u3, kept, d, statistics


def _statistics(*branches: Tensor) -> Statistics:
    sample = torch.stack([means_of_maps(u).flatten(1) for u in branches])
    mean = sample.mean(1)
    variance = torch.stack([_variance(u, mu) for u, mu in zip(branches, mean, strict=True)])
    return Statistics(mean, variance, sample)


def _variance(u: Tensor, mean: Tensor) -> Tensor:
    """Over the batch, [M]; ATen's own, which is of what is left of the mean, but not of all pixels in one sum.

    In channels_last ATen adds pixel after pixel in float32, which leaves some 50 roundings at batch 8 and 56 x 56.
    Several neighbours taken as channels of one pixel are as many shorter sums, in the same time, and leave 2.
    """
    pixels, channels = u.numel() // u.shape[1], u.shape[1]
    rows = u.permute(0, 2, 3, 1)
    together = 1
    if rows.is_contiguous():
        most = max(1, min(MOST_TOGETHER, WIDEST // channels))
        together = next(k for k in range(most, 0, -1) if pixels % k == 0)
        u = rows.view(1, 1, pixels // together, together * channels).permute(0, 3, 1, 2)
    means, variances = (moment.view(together, -1) for moment in torch.batch_norm_update_stats(u, None, None, 0.0))
    # The mean of the variances, and the variance of the means.
    return (means - mean).square_().add_(variances).mean(0)


def _branches(tensors: Sequence[Any], statistics: Statistics, eps: tuple[float, float]) -> tuple[Branch, Branch]:
    """U3 and U1 with their norms."""
    like = statistics.mean[0].view(1, -1, 1, 1)

    def column(parameter: Tensor | None, default: float) -> Tensor:
        return torch.full_like(like, default) if parameter is None else parameter.detach().to(like.dtype).view_as(like)

    found = []
    for i, (weight, shift) in enumerate((tensors[5:7], tensors[7:9])):
        mean = statistics.mean[i].view_as(like)
        reciprocal = torch.rsqrt(statistics.variance[i].view_as(like) + eps[i])
        deviation = statistics.sample[i, :, :, None, None] - mean
        found.append(Branch(mean, reciprocal, column(weight, 1.0) * reciprocal, column(shift, 0.0), deviation))
    return found[0], found[1]


def gradients(
    tensors: Sequence[Any],
    geometry: Geometry,
    d: Tensor,
    grad: Tensor,
    needed: tuple[bool, ...],
    maps: tuple[Tensor, Tensor | None],
    branches: tuple[Branch, Branch],
) -> tuple[Tensor | None, ...]:
    """Gradients of the nine tensors, where ``needed``.

    Args:
        maps: U3 and U1, or None for that.
        branches, d: of the forward.
        grad: dL/dY, [N, M, H_out, W_out].
    """
    x, gwc, pwc, redundant, bias, *norms = tensors
    given = operands(x, gwc, pwc, redundant, geometry, d, grad)
    g, gates = given.g, (given.beta, given.gamma)
    pixels = g.shape[2] * g.shape[3]
    values = g.shape[0] * pixels
    u3, kept = maps
    u1 = pointwise(given.z, redundant, pwc.shape[1]) if kept is None else kept
    scratch = torch.empty_like(u1)
    of_u1 = u1 if kept is None else torch.empty_like(u1)  # what is kept may be asked for again
    b = sums_of_maps(g)
    t = []
    for u, branch in zip((u3, u1), branches, strict=True):
        t.append(torch.addcmul(sums_of_maps(torch.mul(u, g, out=scratch)), branch.mean, b, value=-1))
    three, one = branches
    delta = three.scale * t[0] - one.scale * t[1] + (three.shift - one.shift) * b
    delta *= gates[0] * gates[1]
    of_maps, of_norms = [], []  # of U3, and of U1
    for u, out, branch, gate, of_gate, moved in zip(
        (u3, u1), (scratch, of_u1), branches, gates, t, (delta, -delta), strict=True
    ):
        shift = (gate * b + moved).sum(0, keepdim=True)
        weight = branch.reciprocal * (gate * of_gate + moved * branch.deviation).sum(0, keepdim=True)
        slope = -branch.scale * branch.reciprocal * weight / values
        constant = branch.scale * (moved / pixels - shift / values) - slope * branch.mean
        of_maps.append(torch.addcmul(constant, u, slope, out=out).addcmul_(g, gate * branch.scale))
        of_norms += [weight.flatten(), shift.flatten()]
    of_bias = b.sum((0, 2, 3)).to(bias.dtype) if bias is not None else None
    of_parameters = [None if p is None else of.to(p.dtype) for p, of in zip(norms, of_norms, strict=True)]
    dx, *of_weights = branch_gradients(given, of_maps[0], of_maps[1], needed)
    return (dx, *map(gradient_of, (gwc, pwc, redundant), of_weights), of_bias, *of_parameters)
