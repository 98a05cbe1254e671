"""The GAP / softmax fusion as an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import launch
from ..autocast import promote
from ..native import branches
from ..registration import register_autocast, traceable_op
from .second_order import differentiate_pullback, register_second_order


@traceable_op("gap_softmax_fusion", lambda: launch.fusion.FORWARD_KERNELS)
def gap_softmax_fusion(u3: Tensor, u1: Tensor) -> tuple[Tensor, Tensor]:
    """Y [N, M, H, W], channels_last, and S3 - S1 [N, M] float32, of which the gate is the sigmoid."""
    return launch.gap_softmax_fusion(u3, u1)


@gap_softmax_fusion.register_fake
def _(u3: Tensor, u1: Tensor) -> tuple[Tensor, Tensor]:
    y = launch.empty_channels_last(u3, u3.shape[1], u3.shape[2], u3.shape[3])
    return y, u3.new_empty(u3.shape[:2], dtype=torch.float32)


@traceable_op("gap_softmax_fusion_backward", lambda: launch.fusion.BACKWARD_KERNELS)
def gap_softmax_fusion_backward(grad: Tensor, u3: Tensor, u1: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of u3 and u1, channels_last; ``d`` is S3 - S1 as the forward returned it."""
    return launch.gap_softmax_fusion_backward(grad, u3, u1, d)


@gap_softmax_fusion_backward.register_fake
def _(grad: Tensor, u3: Tensor, u1: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    du3 = launch.empty_channels_last(u3, u3.shape[1], u3.shape[2], u3.shape[3])
    return du3, torch.empty_like(du3)


def _save_fusion(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _fusion_autograd(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None]:
    if grad is None:
        return None, None
    return gap_softmax_fusion_backward(grad, *ctx.saved_tensors)


gap_softmax_fusion.register_autograd(_fusion_autograd, setup_context=_save_fusion)
register_autocast(gap_softmax_fusion, promote)


def _second_order(
    cotangents: tuple[Tensor | None, ...], grad: Tensor, u3: Tensor, u1: Tensor, d: Tensor
) -> tuple[Tensor | None, ...]:
    return *differentiate_pullback(branches.gap_softmax_fusion, (u3, u1), grad, cotangents), None


register_second_order(gap_softmax_fusion_backward, _second_order)
