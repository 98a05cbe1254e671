"""The representative branch as an operator, U3 in memory."""

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
from .common import branch_flops, geometry_of
from .second_order import differentiate_pullback, register_second_order


@traceable_op("representative_branch", lambda: launch.branch.FORWARD_KERNELS)
def representative_branch(
    x3: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """U3 [N, M, H_out, W_out], channels_last; see :func:`spconv_triton.functional.representative_branch`."""
    geometry = geometry_of(weight_gwc, stride, padding, dilation, groups)
    return launch.representative_branch(x3, weight_gwc, weight_pwc, geometry)


@representative_branch.register_fake
def _(
    x3: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    geometry = geometry_of(weight_gwc, stride, padding, dilation, groups)
    height, width = geometry.output_size(x3.shape[2], x3.shape[3])
    return launch.empty_channels_last(x3, weight_gwc.shape[0], height, width)


@traceable_op("representative_branch_backward", lambda: launch.gradients.KERNELS)
def representative_branch_backward(
    grad: Tensor,
    x3: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x3 (channels_last), weight_gwc and weight_pwc."""
    geometry = geometry_of(weight_gwc, stride, padding, dilation, groups)
    return launch.representative_branch_backward(grad, x3, weight_gwc, weight_pwc, geometry)


@representative_branch_backward.register_fake
def _(
    grad: Tensor,
    x3: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dx3 = launch.empty_channels_last(x3, x3.shape[1], x3.shape[2], x3.shape[3])
    return dx3, torch.empty_like(weight_gwc), torch.empty_like(weight_pwc)


def _save_branch(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x3, weight_gwc, weight_pwc, *window = inputs
    ctx.save_for_backward(x3, weight_gwc, weight_pwc)
    ctx.window = window


def _branch_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *representative_branch_backward(grad, *ctx.saved_tensors, *ctx.window), None, None, None, None


representative_branch.register_autograd(_branch_autograd, setup_context=_save_branch)
register_autocast(representative_branch, lambda x3, gwc, pwc, *window: (*cast(x3, gwc, pwc), *window))


def _second_order(
    cotangents: tuple[Tensor | None, ...], grad: Tensor, x3: Tensor, gwc: Tensor, pwc: Tensor, *window: Any
) -> tuple[Tensor | None, ...]:
    geometry = geometry_of(gwc, *window)

    def branch(x3: Tensor, gwc: Tensor, pwc: Tensor) -> Tensor:
        return branches.representative_branch(x3, gwc, pwc, geometry)

    return *differentiate_pullback(branch, (x3, gwc, pwc), grad, cotangents), *(None,) * 4


register_second_order(representative_branch_backward, _second_order)


@flop_formula(getattr(torch.ops, NAMESPACE).representative_branch)
def _(x_shape: Any, gwc_shape: Any, pwc_shape: Any, *window: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return branch_flops(x_shape, gwc_shape, window)


@flop_formula(getattr(torch.ops, NAMESPACE).representative_branch_backward)
def _(
    grad_shape: Any, x_shape: Any, gwc_shape: Any, pwc_shape: Any, *window: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return 2 * branch_flops(x_shape, gwc_shape, window)
