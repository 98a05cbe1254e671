"""The layer with batch norms in its branches, normalising by the batch, as an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import launch
from ..autocast import cast
from ..flop_formulas import flop_formula
from ..native.branches import gap_softmax_fusion, pointwise, representative_branch
from ..registration import NAMESPACE, register_autocast, traceable_op
from .common import backward_flops, forward_flops, geometry_of
from .second_order import differentiate_pullback, register_second_order


@traceable_op("spconv2d_batch_norm", lambda: launch.branch_norm.FORWARD_KERNELS)
def spconv2d_batch_norm(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    bias: Tensor | None,
    norm_weight3: Tensor | None,
    norm_bias3: Tensor | None,
    norm_weight1: Tensor | None,
    norm_bias1: Tensor | None,
    eps3: float,
    eps1: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Y [N, M, H_out, W_out], channels_last, and what the backward keeps: :class:`spconv_triton.launch.Kept`."""
    geometry = geometry_of(weight_gwc, stride, padding, dilation, groups)
    norms = launch.Norms(norm_weight3, norm_bias3, norm_weight1, norm_bias1)
    y, kept = launch.spconv2d_batch_norm(
        x, weight_gwc, weight_pwc, weight_redundant, bias, norms, (eps3, eps1), geometry
    )
    return y, *kept


@spconv2d_batch_norm.register_fake
def _(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    bias: Tensor | None,
    norm_weight3: Tensor | None,
    norm_bias3: Tensor | None,
    norm_weight1: Tensor | None,
    norm_bias1: Tensor | None,
    eps3: float,
    eps1: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    geometry = geometry_of(weight_gwc, stride, padding, dilation, groups)
    kept = launch.empty_kept(x, weight_gwc, geometry)
    return launch.empty_output(x, weight_gwc, geometry), *kept


@traceable_op("spconv2d_batch_norm_backward", lambda: launch.branch_norm.BACKWARD_KERNELS)
def spconv2d_batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    norm_weight3: Tensor | None,
    norm_bias3: Tensor | None,
    norm_weight1: Tensor | None,
    norm_bias1: Tensor | None,
    branches: Tensor,
    d: Tensor,
    batch: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (channels_last), the three weights, and the norms' parameters and the bias, [5, M] float32."""
    geometry = geometry_of(weight_gwc, stride, padding, dilation, groups)
    return launch.spconv2d_batch_norm_backward(
        grad,
        x,
        weight_gwc,
        weight_pwc,
        weight_redundant,
        launch.Norms(norm_weight3, norm_bias3, norm_weight1, norm_bias1),
        launch.Kept(branches, d, batch),
        geometry,
    )


@spconv2d_batch_norm_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    norm_weight3: Tensor | None,
    norm_bias3: Tensor | None,
    norm_weight1: Tensor | None,
    norm_bias1: Tensor | None,
    branches: Tensor,
    d: Tensor,
    batch: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx = launch.empty_channels_last(x, x.shape[1], x.shape[2], x.shape[3])
    d_gwc, d_pwc, d_redundant = (torch.empty_like(w) for w in (weight_gwc, weight_pwc, weight_redundant))
    return dx, d_gwc, d_pwc, d_redundant, d.new_empty((5, d.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight_gwc, weight_pwc, weight_redundant, bias, *norms, _, _ = inputs[:11]
    kept = output[1:]
    ctx.save_for_backward(x, weight_gwc, weight_pwc, weight_redundant, *norms, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.window = inputs[11:]
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (*norms, bias)]


def _autograd(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 15
    *d_tensors, d_norms = spconv2d_batch_norm_backward(grad, *ctx.saved_tensors, *ctx.window)
    rows = (None if dtype is None else row.to(dtype) for row, dtype in zip(d_norms, ctx.dtypes, strict=True))
    *d_norm_tensors, d_bias = rows
    return *d_tensors, d_bias, *d_norm_tensors, *(None,) * 6


spconv2d_batch_norm.register_autograd(_autograd, setup_context=_save)
register_autocast(spconv2d_batch_norm, lambda *args: (*cast(*args[:5]), *args[5:]))


def _second_order(
    cotangents: tuple[Tensor | None, ...],
    grad: Tensor,
    x: Tensor,
    gwc: Tensor,
    pwc: Tensor,
    redundant: Tensor,
    norm_weight3: Tensor | None,
    norm_bias3: Tensor | None,
    norm_weight1: Tensor | None,
    norm_bias1: Tensor | None,
    branches: Tensor,
    d: Tensor,
    batch: Tensor,
    *window: Any,
) -> tuple[Tensor | None, ...]:
    geometry = geometry_of(gwc, *window)
    _, variance, reciprocal = batch.unbind()
    eps = reciprocal.square().reciprocal() - variance  # as exact as the sum variance + eps is

    def layer(
        x: Tensor,
        gwc: Tensor,
        pwc: Tensor,
        redundant: Tensor,
        weight3: Tensor,
        bias3: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        bias: Tensor,
    ) -> Tensor:
        representative = pwc.shape[1]
        u3 = representative_branch(x[:, :representative], gwc, pwc, geometry)
        u1 = pointwise(x[:, representative:], redundant, geometry)
        normed = _normalise(u3, weight3, bias3, eps[0]), _normalise(u1, weight1, bias1, eps[1])
        return gap_softmax_fusion(*normed) + bias[:, None, None].to(x.dtype)

    norms = (norm_weight3, norm_bias3, norm_weight1, norm_bias1)
    rows = (*launch.Norms(*norms).tensors(d), d.new_zeros(d.shape[1]))  # the bias has no part in any gradient
    tensors = (x, gwc, pwc, redundant, *rows)
    d_rows = (None,) * 5 if cotangents[4] is None else cotangents[4].unbind()
    by_grad, *by_tensors = differentiate_pullback(layer, tensors, grad, (*cotangents[:4], *d_rows))
    by_norms = (by if norm is not None else None for by, norm in zip(by_tensors[4:8], norms, strict=True))
    return by_grad, *by_tensors[:4], *by_norms, *(None,) * 7


def _normalise(u: Tensor, weight: Tensor, bias: Tensor, eps: Tensor) -> Tensor:
    """A batch norm of [N, M, H, W] by the batch, ``eps`` by channel, [M]."""
    precise = u.to(eps.dtype)
    variance, mean = torch.var_mean(precise, (0, 2, 3), correction=0, keepdim=True)
    scale = weight.to(eps.dtype)[:, None, None] * torch.rsqrt(variance + eps[:, None, None])
    return ((precise - mean) * scale + bias.to(eps.dtype)[:, None, None]).to(u.dtype)


register_second_order(spconv2d_batch_norm_backward, _second_order)


flop_formula(getattr(torch.ops, NAMESPACE).spconv2d_batch_norm)(forward_flops)
flop_formula(getattr(torch.ops, NAMESPACE).spconv2d_batch_norm_backward)(backward_flops)
