"""The whole layer as an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import launch
from ..autocast import cast
from ..flop_formulas import flop_formula
from ..native import branches
from ..registration import NAMESPACE, register_autocast, traceable_op
from .common import backward_flops, forward_flops, geometry_of
from .second_order import differentiate_pullback, register_second_order


@traceable_op("spconv2d", lambda: launch.layer.FORWARD_KERNELS)
def spconv2d(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Y [N, M, H_out, W_out], channels_last, and what the backward keeps; see :func:`spconv_triton.launch.spconv2d`."""
    geometry = geometry_of(weight_gwc, stride, padding, dilation, groups)
    return launch.spconv2d(x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias, geometry)


@spconv2d.register_fake
def _(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    geometry = geometry_of(weight_gwc, stride, padding, dilation, groups)
    batch, channels = x.shape[:2]
    return (
        launch.empty_output(x, weight_gwc, geometry),
        x.new_empty((batch, weight_gwc.shape[0]), dtype=torch.float32),
        x.new_empty((batch, geometry.taps, weight_pwc.shape[1])),
        x.new_empty((batch, channels)),
    )


@traceable_op("spconv2d_backward", lambda: launch.gradients.KERNELS)
def spconv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    branch_bias: Tensor | None,
    ratio: Tensor,
    tap_mean: Tensor,
    pool_mean: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (channels_last), the three weights and the branch bias ([0, M] where there is none)."""
    geometry = geometry_of(weight_gwc, stride, padding, dilation, groups)
    return launch.spconv2d_backward(
        grad, x, weight_gwc, weight_pwc, weight_redundant, branch_bias, ratio, tap_mean, pool_mean, geometry
    )


@spconv2d_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    branch_bias: Tensor | None,
    ratio: Tensor,
    tap_mean: Tensor,
    pool_mean: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx = launch.empty_channels_last(x, x.shape[1], x.shape[2], x.shape[3])
    d_gwc, d_pwc, d_redundant = (torch.empty_like(w) for w in (weight_gwc, weight_pwc, weight_redundant))
    d_branch_bias = torch.empty_like(branch_bias) if branch_bias is not None else grad.new_empty((0, grad.shape[1]))
    return dx, d_gwc, d_pwc, d_redundant, d_branch_bias


def _save_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias, *window = inputs
    kept = output[1:]
    ctx.save_for_backward(x, weight_gwc, weight_pwc, weight_redundant, branch_bias, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.window = window
    ctx.bias_dtype = None if bias is None else bias.dtype


def _layer_autograd(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    kept = ctx.saved_tensors  # once: a checkpoint computes them again for that, and forgets them
    *grads, d_branch_bias = spconv2d_backward(grad, *kept, *ctx.window)
    d_bias = None if ctx.bias_dtype is None else grad.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
    return *grads, d_bias, None if kept[4] is None else d_branch_bias, None, None, None, None


spconv2d.register_autograd(_layer_autograd, setup_context=_save_layer)
register_autocast(spconv2d, lambda *args: (*cast(*args[:5]), *args[5:]))


def _second_order(
    cotangents: tuple[Tensor | None, ...],
    grad: Tensor,
    x: Tensor,
    gwc: Tensor,
    pwc: Tensor,
    redundant: Tensor,
    branch_bias: Tensor | None,
    ratio: Tensor,
    tap_mean: Tensor,
    pool_mean: Tensor,
    *window: Any,
) -> tuple[Tensor | None, ...]:
    geometry = geometry_of(gwc, *window)

    def layer(x: Tensor, gwc: Tensor, pwc: Tensor, redundant: Tensor, branch_bias: Tensor | None) -> Tensor:
        return branches.compose(x, gwc, pwc, redundant, None, branch_bias, geometry)

    tensors = (x, gwc, pwc, redundant, branch_bias)
    return *differentiate_pullback(layer, tensors, grad, cotangents), *(None,) * 7


register_second_order(spconv2d_backward, _second_order)


flop_formula(getattr(torch.ops, NAMESPACE).spconv2d)(forward_flops)
flop_formula(getattr(torch.ops, NAMESPACE).spconv2d_backward)(backward_flops)
