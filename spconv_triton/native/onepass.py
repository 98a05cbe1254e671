"""The whole layer on ATen, keeping x and one number per (sample, output channel) for the backward.

Forward, in channels_last: the group-wise convolution is oneDNN's, the point-wise ones are matrix products over pixels
(:mod:`spconv_triton.native.products`).

On small maps U3 and U1 are made side by side, the gate comes from their means, and the blend is written over U1. On
large ones every further map costs more than weights for each sample: there is none but Y, the gate comes first
(:mod:`spconv_triton.native.gate`), and the point-wise convolutions are added in one product,

    Y = scale GWC(x3) + offset + [scale Wp | a gamma W1] z,   scale = a beta,   offset = a (beta b3 + gamma b1) + bias

but where oneDNN multiplies wider than ATen: there two more maps take less time than a product for each sample.

Where :func:`spconv_triton.set_recompute` says that U3 - U1 is kept for the backward, both maps are made.

In inference a is the scale of a norm that follows, and a residual and an activation follow in place; else a is 1. There
weights are prepared (:mod:`spconv_triton.native.weights`), with which the branches take less time, so that maps are
large only later. A batch of many samples goes through the branches in parts (:mod:`spconv_triton.native.parts`).

The backward is :mod:`spconv_triton.native.backward`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..autocast import without_autocast
from ..dispatch import is_exporting, needs_plain_backward, needs_plain_operations
from ..epilogue import NOTHING, Epilogue, activate
from ..geometry import Geometry
from ..layout import memory_format
from ..recomputation import recomputes
from . import branches
from .backward import differentiable_gradients, gradients
from .convolution import channels_last
from .gate import bias_difference, difference_of_means, gate_argument, means_of_maps, sums_of_maps
from .inference import Inference
from .parts import parts_of, pay_in_training, samples_together
from .products import pixels
from .weights import MergedWeights, Plan, PreparedWeights, Weights, for_one_call

Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""x, weight_gwc, weight_pwc, weight_redundant, bias and branch_bias."""


class Memory(NamedTuple):
    """What a layer remembers, and how this call differs from others on the same tensors."""

    inference: Inference
    call: Any


class Into(NamedTuple):
    """Memory for what a forward writes, maps [N, M, H_out, W_out] of the dtype of x.

    Attributes:
        y: for Y; None for new memory.
        difference: for U3 - U1; None if nobody needs it.
    """

    y: Tensor | None = None
    difference: Tensor | None = None


NEW = Into()


class Additions(NamedTuple):
    """What is added to the branches and to their blend, and what follows.

    Attributes:
        bias: [M] or None, behind the gate.
        branch_bias: [2, M] or None, before it.
        after: the rest.
    """

    bias: Tensor | None
    branch_bias: Tensor | None
    after: Epilogue

    def join(self, dtype: torch.dtype) -> bool:
        """Whether the bias may be added by a convolution of this dtype: nothing comes between the two."""
        bias = self.bias
        return bias is not None and bias.dtype == dtype and self.branch_bias is None and self.after.norm_scale is None

    def offset(self, d: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What the biases add to Y, [N, M, 1, 1] or [M, 1, 1]: a (beta b3 + gamma b1) + bias; beta is 1 without d."""
        columns = None if self.bias is None else self.bias.to(dtype).view(-1, 1, 1)
        if self.branch_bias is None:
            return columns
        shift3, shift1 = self.branch_bias.to(dtype)[:, :, None, None].unbind()
        offset = shift3 if d is None else torch.sigmoid(d) * shift3 + torch.sigmoid(-d) * shift1
        if self.after.norm_scale is not None:
            offset = offset * self.after.norm_scale.to(dtype)[:, None, None]
        return offset if columns is None else offset + columns


def spconv2d(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    geometry: Geometry,
    memory: Memory | None = None,
) -> Tensor:
    """Y = beta U3 + gamma U1 + bias, on arguments that :func:`spconv_triton.functional.spconv2d` has checked.

    Args:
        x: [N, L, H, W], float32, float64, bfloat16 or float16.
        weight_gwc: [M, alpha L / G, k, k].
        weight_pwc: [M, alpha L, 1, 1].
        weight_redundant: [M, L - alpha L, 1, 1]; None where alpha = 1, and then Y = U3 + bias.
        bias: [M] or None, added after the gate.
        branch_bias: [2, M] or None, dtype of ``x`` or float32; added to U3 and U1 before the gate.
        memory: of the layer, in inference.

    Returns:
        [N, M, H_out, W_out], dtype of ``x``, in the memory format that it is made in: the caller sees to that of ``x``.

    Source: Zhang et al., IJCAI 2020, sections 3.2 to 3.4.
    """
    arguments = (x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias)
    differentiated = differentiates(arguments)
    if needs_plain_operations(arguments) or (weight_redundant is None and differentiated):
        return branches.compose(*arguments, geometry)
    if torch.compiler.is_compiling():
        # The partitioner would keep U3 - U1; a checkpoint tells it not to. On a CPU it is worth its memory: without it
        # a step takes a quarter longer.
        if differentiated and not x.is_cpu and not is_exporting():
            return checkpoint(branches.compose, *arguments, geometry, use_reentrant=False, preserve_rng_state=False)
        return branches.compose(*arguments, geometry)
    if differentiated:
        return OnePass.apply(*arguments, geometry)
    return _infer(arguments, geometry, NOTHING, memory)


def differentiates(arguments: tuple[Any, ...]) -> bool:
    """Whether autograd wants gradients of any of them."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments)


def spconv2d_inference(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    geometry: Geometry,
    after: Epilogue,
    memory: Memory | None = None,
) -> Tensor:
    """Y = activation(norm_scale (beta U3 + gamma U1) + bias + residual), without gradients.

    Arguments and result as of :func:`spconv2d`; ``bias`` may also be float32.
    """
    arguments = (x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias)
    if needs_plain_operations(arguments) or torch.compiler.is_compiling():
        return branches.compose(*arguments, geometry, after)
    return _infer(arguments, geometry, after, memory)


def _infer(arguments: Arguments, geometry: Geometry, after: Epilogue, memory: Memory | None) -> Tensor:
    x, gwc, pwc, redundant, bias, branch_bias = arguments
    if memory is None:
        return forward(x, for_one_call(x, gwc, pwc, redundant, geometry), bias, branch_bias, after)[0]
    inference, call = memory
    weights = inference.weights(x, (gwc, pwc, redundant), geometry)
    y, _ = forward(x, weights, bias, branch_bias, after)
    inference.learn((call, after.activation), x, weights, (bias, branch_bias, after.norm_scale, after.residual))
    return y


def recall(arguments: Arguments, after: Epilogue, memory: Memory) -> Tensor | None:
    """Y of a call like one that the layer has made before, in the memory format of ``x``; None if it has not.

    Args:
        arguments: of :func:`spconv2d`, unchecked.
    """
    x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias = arguments
    inference, call = memory
    others = (bias, branch_bias, after.norm_scale, after.residual)
    found = inference.recall((call, after.activation), x, (weight_gwc, weight_pwc, weight_redundant), others)
    if found is None:
        return None
    weights, layout = found
    return forward(x, weights, bias, branch_bias, after)[0].contiguous(memory_format=layout)


class OnePass(torch.autograd.Function):
    """Y from the arguments of :func:`spconv2d`; keeps them, d = S3 - S1, and U3 - U1 if asked to."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.geometry = arguments
        x, gwc, pwc, redundant, bias, branch_bias = tensors
        difference = None if recomputes() else _empty_map(x, gwc.shape[0], ctx.geometry)
        weights = for_one_call(x, gwc, pwc, redundant, ctx.geometry)
        y, d = forward(x, weights, bias, branch_bias, difference=difference)
        ctx.save_for_backward(*tensors, d, difference)
        return y.data  # a view of nothing: autograd forbids an in-place ReLU behind a Function that returns a view

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        *inputs, d, difference = ctx.saved_tensors
        with without_autocast(grads[0]):
            if needs_plain_backward(grads[0]):
                layer = functools.partial(branches.compose, geometry=ctx.geometry)
                return (*differentiable_gradients(layer, inputs, grads[0]), None)
            return (*gradients(inputs, ctx.geometry, d, grads[0], ctx.needs_input_grad, difference), None)


def forward(
    x: Tensor,
    weights: Weights,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    after: Epilogue = NOTHING,
    difference: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Y and d = S3 - S1, [N, M, 1, 1], in float32 or better; None without a redundant part. Without gradients.

    In training U3 - U1 is written into ``difference``, if it is given.
    """
    x, added = channels_last(x), Additions(bias, branch_bias, after)
    if not weights.has_gate:
        joins = added.join(x.dtype)
        y = weights.u3(x, weights.pointwise_input(x), bias if joins else None)
        return _finish(y, None if joins else added.offset(None, y.dtype), after, x.dtype), None
    if difference is None and weights.gate_first(x):
        return _gate_first(x, weights, added)
    if isinstance(weights, PreparedWeights):
        plan = weights.plan(x.shape)
        if plan.samples >= x.shape[0]:
            return _by_prepared_weights(x, weights, added, Into(None, difference), plan)
        return _in_parts(x, weights, added, difference, plan.samples)
    size = weights.geometry.output_size(x.shape[2], x.shape[3])
    samples = samples_together(x, weights.gwc.shape[0], size)
    if samples < x.shape[0] and pay_in_training(x.dtype):
        return _in_parts(x, weights, added, difference, samples)
    return _by_branches(x, weights, added, Into(None, difference))


def _empty_map(x: Tensor, outputs: int, geometry: Geometry) -> Tensor:
    """[N, ``outputs``, H_out, W_out], dtype of ``x``, in channels_last on a CPU."""
    size = geometry.output_size(x.shape[2], x.shape[3])
    layout = torch.channels_last if x.is_cpu else memory_format(x)
    return torch.empty((x.shape[0], outputs, *size), dtype=x.dtype, device=x.device, memory_format=layout)


def _in_parts(
    x: Tensor, weights: Weights, added: Additions, difference: Tensor | None, samples: int
) -> tuple[Tensor, Tensor]:
    """Y and d, so many samples at a time."""
    after = added.after
    y = _empty_map(x, weights.gwc.shape[0], weights.geometry)
    residuals, into_y, into_difference = (
        parts_of(maps, samples, x.shape[0]) for maps in (after.residual, y, difference)
    )
    of_parts = [
        _by_branches(of_x, weights, added._replace(after=after._replace(residual=residual)), Into(*into))[1]
        for of_x, residual, *into in zip(x.split(samples), residuals, into_y, into_difference, strict=True)
    ]
    return y, torch.cat(of_parts)


def _by_branches(x: Tensor, weights: Weights, added: Additions, into: Into = NEW) -> tuple[Tensor, Tensor]:
    """Y and d."""
    if isinstance(weights, MergedWeights | PreparedWeights):
        return _by_prepared_weights(x, weights, added, into)
    return _by_given_weights(x, weights, added, into)


def _by_prepared_weights(
    x: Tensor,
    weights: PreparedWeights | MergedWeights,
    added: Additions,
    into: Into = NEW,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`_by_branches`. On small maps the calls take the time, so there are few, and some are planned."""
    # An output bias alone may join both branches: beta + gamma = 1, and the gate sees their difference. What is kept of
    # that is without it, and so without its roundings.
    joins = into.difference is None and added.join(x.dtype)
    joined = added.bias if joins else None
    z = x if plan is not None and plan.is_z else weights.pointwise_input(x)
    u3, u1 = weights.u3(x, z, joined), weights.u1(z, joined)
    d = torch.sub(sums_of_maps(u3), sums_of_maps(u1))
    d = d.div_(u3.shape[2] * u3.shape[3] if plan is None else plan.pixels)
    if added.branch_bias is not None:
        d += bias_difference(added.branch_bias, d.dtype)
    if not math.isfinite(d.sum()):
        return _by_given_weights(x, weights.given, added, into)
    offset = None if joins else added.offset(d, d.dtype)
    return _finish(_blend(u3, u1, d, into), offset, added.after, x.dtype), d


def _gate_first(x: Tensor, weights: Weights, added: Additions) -> tuple[Tensor, Tensor]:
    """Y and d, without a map of either branch."""
    after = added.after
    z = weights.pointwise_input(x)
    y = weights.convolve(x)
    d = difference_of_means(y, z, weights.pwc, weights.redundant)
    if added.branch_bias is not None:
        d += bias_difference(added.branch_bias, d.dtype)
    if not math.isfinite(d.sum()):
        return _by_given_weights(x, weights.given, added)
    beta, gamma = torch.sigmoid(d), torch.sigmoid(-d)
    if after.norm_scale is not None:
        beta, gamma = (gate * after.norm_scale.to(d.dtype)[:, None, None] for gate in (beta, gamma))
    offset, gate = added.offset(d, d.dtype), beta.to(y.dtype)
    y = y.mul_(gate) if offset is None else torch.addcmul(offset.to(y.dtype), y, gate, out=y)
    if after.residual is not None:
        y += after.residual
    of_sample = (weights.pwc.flatten(1) * beta.squeeze(3), weights.redundant.flatten(1) * gamma.squeeze(3))
    pixels(y).baddbmm_(pixels(z), torch.cat(of_sample, 2).to(y.dtype).transpose(1, 2))
    return activate(y, after.activation, inplace=True), d


def _by_given_weights(x: Tensor, weights: Weights, added: Additions, into: Into = NEW) -> tuple[Tensor, Tensor]:
    """As :func:`_by_branches`, on any device and of anything, finite or not."""
    z = weights.pointwise_input(x)
    u3, u1 = weights.u3(x, z), weights.u1(z)
    s3, s1 = means_of_maps(u3), means_of_maps(u1)
    if added.branch_bias is not None:
        s3 += added.branch_bias[0, :, None, None]
        s1 += added.branch_bias[1, :, None, None]
    d = gate_argument(s3, s1)
    return _finish(_blend(u3, u1, d, into), added.offset(d, d.dtype), added.after, x.dtype), d


def _blend(u3: Tensor, u1: Tensor, d: Tensor, into: Into) -> Tensor:
    """beta U3 + gamma U1, written over ``u1`` if not into memory that is given."""
    out = u1 if into.y is None else into.y
    if into.difference is not None:
        torch.sub(u3, u1, out=into.difference)
    if u1.dtype == d.dtype:
        return torch.lerp(u1, u3, torch.sigmoid(d), out=out)
    # A rounding of beta would be a large one of gamma = 1 - beta.
    of_u1 = u1.mul_(torch.sigmoid(-d).to(u1.dtype))
    return torch.addcmul(of_u1, u3, torch.sigmoid(d).to(u3.dtype), out=out)


def _finish(y: Tensor, offset: Tensor | None, after: Epilogue, dtype: torch.dtype) -> Tensor:
    """activation(a y + offset + residual) in ``dtype``, in place where that is the dtype of ``y``."""
    if after.norm_scale is not None:
        scale = after.norm_scale.to(y.dtype)[:, None, None]
        y = y.mul_(scale) if offset is None else torch.addcmul(offset, y, scale, out=y)
    elif offset is not None:
        y += offset
    if after.residual is not None:
        y += after.residual
    y = activate(y, after.activation, inplace=True)
    return y if y.dtype == dtype else y.to(dtype)
