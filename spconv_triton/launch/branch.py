"""The representative branch on its own, U3 in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import Geometry
from ..kernels.branch import branch_forward
from .common import (
    channels_last,
    empty_output,
    forward_grid,
    layer_constants,
    pixel_arguments,
    pixel_major,
)
from .gradients import finish_weight_grads, layer_input_grad, layer_weight_grad
from .launching import launch

FORWARD_KERNELS = (branch_forward,)


def representative_branch(x3: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry) -> Tensor:
    """U3, [N, M, H_out, W_out], channels_last.

    Args:
        x3: [N, alpha L, H, W]; a channel slice of a channels_last tensor is read in place.
        weight_gwc: [M, alpha L / G, k, k].
        weight_pwc: [M, alpha L, 1, 1].
    """
    x3, spacing = pixel_major(x3)
    u3 = empty_output(x3, weight_gwc, geometry)
    if u3.numel() == 0:
        return u3
    pixels, *sizes = pixel_arguments(x3, (u3.shape[2], u3.shape[3]), "x3")
    launch(
        branch_forward,
        forward_grid(pixels, weight_gwc, geometry),
        x3,
        channels_last(weight_gwc),
        weight_pwc.contiguous(),
        u3,
        pixels,
        *sizes,
        spacing,
        **layer_constants(x3, weight_gwc, weight_pwc, geometry),
    )
    return u3


def representative_branch_backward(
    grad: Tensor, x3: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x3 (channels_last), weight_gwc and weight_pwc.

    Args:
        grad: dL/dU3, [N, M, H_out, W_out].
        x3, weight_gwc, weight_pwc: as in :func:`representative_branch`.
    """
    weights = (weight_gwc, weight_pwc, None)
    dx3 = layer_input_grad(grad, x3, weights, None, None, geometry)
    if grad.numel() == 0:
        return dx3, torch.zeros_like(weight_gwc), torch.zeros_like(weight_pwc)
    partial = layer_weight_grad(grad, x3, weights, None, geometry)[0]
    return dx3, *finish_weight_grads(partial, weights, None, geometry)[:2]
