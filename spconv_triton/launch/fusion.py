"""GAP / softmax fusion of two branches in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.arithmetic import cdiv
from ..kernels.fusion import fusion_blend, fusion_blend_grad, fusion_statistics
from .common import Grid, channels_last, check_samples, pixel_splits
from .launching import launch

FORWARD_KERNELS = (fusion_statistics, fusion_blend)
BACKWARD_KERNELS = (fusion_statistics, fusion_blend_grad)


def gap_softmax_fusion(u3: Tensor, u1: Tensor) -> tuple[Tensor, Tensor]:
    """Y [N, M, H, W], channels_last, and the gate's argument S3 - S1, [N, M] float32."""
    check_samples(u3.shape[0], u3.shape[1], "u3", u3.shape)
    u3, u1 = channels_last(u3), channels_last(u1)
    y = torch.empty_like(u3)
    d = u3.new_empty(u3.shape[:2], dtype=torch.float32)
    if u3.numel() == 0:
        return y, d
    partial = _fusion_statistics(u3, u1, None)
    batch, channels, height, width = u3.shape
    launch(
        fusion_blend,
        blend_grid(u3),
        u3,
        u1,
        partial,
        y,
        d,
        batch,
        height * width,
        C=channels,
        SPLITS=partial.shape[0],
    )
    return y, d


def gap_softmax_fusion_backward(grad: Tensor, u3: Tensor, u1: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of u3 and u1, channels_last.

    Args:
        grad: dL/dY, [N, M, H, W].
        u3, u1: the branches.
        d: S3 - S1, [N, M] float32.
    """
    grad, u3, u1 = channels_last(grad), channels_last(u3), channels_last(u1)
    du3, du1 = torch.empty_like(u3), torch.empty_like(u3)
    if u3.numel() == 0:
        return du3, du1
    partial = _fusion_statistics(u3, u1, grad)
    batch, channels, height, width = u3.shape
    launch(
        fusion_blend_grad,
        blend_grid(u3),
        grad,
        partial,
        d,
        du3,
        du1,
        batch,
        height * width,
        C=channels,
        SPLITS=partial.shape[0],
    )
    return du3, du1


def _fusion_statistics(u3: Tensor, u1: Tensor, grad: Tensor | None) -> Tensor:
    """Partial sums of U3 - U1, weighted by ``grad`` if given: [splits, N, M] float32."""
    batch, channels, height, width = u3.shape
    pixels = height * width
    splits = pixel_splits(batch, channels, pixels, 16)
    partial = u3.new_empty((splits, batch, channels), dtype=torch.float32)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return batch * cdiv(channels, meta["BLOCK_C"]), splits

    launch(
        fusion_statistics,
        grid,
        u3,
        u1,
        u3 if grad is None else grad,
        partial,
        batch,
        pixels,
        cdiv(pixels, splits),
        C=channels,
        WEIGHTED=grad is not None,
    )
    return partial


def blend_grid(u3: Tensor) -> Grid:
    """Channel blocks x pixel blocks of a sample x samples, of [N, C, H, W]."""
    batch, channels, height, width = u3.shape

    def grid(meta: dict[str, Any]) -> tuple[int]:
        pixel_blocks = cdiv(height * width, meta["BLOCK_PIX"])
        return (batch * pixel_blocks * cdiv(channels, meta["BLOCK_C"]),)

    return grid
