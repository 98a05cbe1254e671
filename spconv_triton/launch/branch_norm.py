"""The layer with a batch norm in each branch, normalising by the batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import Geometry
from ..kernels.arithmetic import cdiv
from ..kernels.branch_norm import branches_forward, norm_blend, norm_gate
from ..kernels.branch_norm_backward import norm_blend_grad, norm_coefficients, norm_sums
from ..kernels.moments import sample_moments
from ..kernels.tuning import MOMENT_PIXELS
from . import gradients
from .common import (
    channels_last,
    check_samples,
    empty_channels_last,
    empty_output,
    forward_grid,
    layer_constants,
    pixel_arguments,
    pixel_major,
    pixel_splits,
)
from .fusion import blend_grid
from .gradients import finish_weight_grads, layer_input_grad, layer_weight_grad
from .launching import launch

FORWARD_KERNELS = (branches_forward, sample_moments, norm_gate, norm_blend)
BACKWARD_KERNELS = (norm_sums, norm_coefficients, norm_blend_grad, *gradients.KERNELS)

COEFFICIENT_BLOCKS = {"BLOCK_N": 64, "BLOCK_C": 16}
"""Of the kernels that go over all samples of a few channels: narrow, for there are few channels and many processors."""


class Norms(NamedTuple):
    """Weight and bias of the norm of U3, then of U1, [M] each; None is 1, or 0."""

    weight3: Tensor | None
    bias3: Tensor | None
    weight1: Tensor | None
    bias1: Tensor | None

    def tensors(self, like: Tensor) -> list[Tensor]:
        """All four, contiguous, on the device of ``like`` [..., M]."""
        missing = [like.new_ones(like.shape[-1]), like.new_zeros(like.shape[-1])] if None in self else []
        return [
            missing[position % 2] if tensor is None else tensor.contiguous() for position, tensor in enumerate(self)
        ]


class Kept(NamedTuple):
    """What a forward leaves for its backward.

    Attributes:
        branches: U3 and U1 side by side, [N, 2 M, H_out, W_out], channels_last.
        d: S3 - S1 after the norms, [N, M] float32.
        batch: mean, variance by N H_out W_out, and 1 / sqrt(variance + eps) over the batch, [3, 2, M] float32.
    """

    branches: Tensor
    d: Tensor
    batch: Tensor


def spconv2d_batch_norm(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    bias: Tensor | None,
    norms: Norms,
    eps: tuple[float, float],
    geometry: Geometry,
) -> tuple[Tensor, Kept]:
    """Y [N, M, H_out, W_out], channels_last, in four launches, and what the backward needs.

    Args:
        x: [N, L, H, W], at least one output pixel; a channel slice of a channels_last tensor is read in place.
        weight_gwc, weight_pwc, weight_redundant: [M, alpha L / G, k, k], [M, alpha L, 1, 1], [M, L - alpha L, 1, 1].
        bias: [M], added after the gate.
        norms, eps: of U3, then of U1.
    """
    x, spacing = pixel_major(x)
    y = empty_output(x, weight_gwc, geometry)
    batch, outputs, *output_size = y.shape
    kept = empty_kept(x, weight_gwc, geometry)
    pixels, *sizes = pixel_arguments(x, (output_size[0], output_size[1]))
    check_samples(batch, 3 * outputs, "x", x.shape)
    area = output_size[0] * output_size[1]
    period = MOMENT_PIXELS // torch.sym_min(area & -area, MOMENT_PIXELS)  # by the gcd, of what may be a symbol
    parts = cdiv(pixels, MOMENT_PIXELS) + batch - 1 - (batch - 1) // period
    part_mean, part_square = (kept.d.new_empty((parts, 2 * outputs)) for _ in range(2))
    per_group = forward_grid(pixels, weight_gwc, geometry)
    launch(
        branches_forward,
        lambda meta: (*per_group(meta), 2),
        x,
        channels_last(weight_gwc),
        weight_pwc.contiguous(),
        weight_redundant.contiguous(),
        kept.branches,
        part_mean,
        part_square,
        pixels,
        *sizes,
        spacing,
        period,
        C=x.shape[1],
        **layer_constants(x, weight_gwc, weight_pwc, geometry),
    )
    sample_mean, sample_square = (kept.d.new_empty((batch, 2 * outputs)) for _ in range(2))
    launch(
        sample_moments,
        (cdiv(2 * outputs, 64) * batch,),
        part_mean,
        part_square,
        sample_mean,
        sample_square,
        area,
        period,
        C=2 * outputs,
        BLOCK_PIX=MOMENT_PIXELS,
        BLOCK_PARTS=16,
        BLOCK_C=64,
    )
    planes = kept.d.new_empty((3, batch, outputs))
    launch(
        norm_gate,
        (cdiv(outputs, COEFFICIENT_BLOCKS["BLOCK_C"]),),
        sample_mean,
        sample_square,
        *norms.tensors(kept.d),
        kept.d if bias is None else bias.contiguous(),
        kept.batch,
        kept.d,
        planes,
        batch,
        area,
        *eps,
        C=outputs,
        BIAS=bias is not None,
        **COEFFICIENT_BLOCKS,
    )
    launch(norm_blend, blend_grid(y), kept.branches, kept.batch, planes, y, batch, area, C=outputs)
    return y, kept


def spconv2d_batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    norms: Norms,
    kept: Kept,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (channels_last) and the three weights, and of the norms' four parameters and the bias, [5, M].

    The last in float32, in the order of :class:`Norms`. Six launches, seven at a
    stride.

    Args:
        grad: dL/dY, [N, M, H_out, W_out].
        kept: as :func:`spconv2d_batch_norm` returned it.
    """
    grad = channels_last(grad)
    batch, outputs, height, width = grad.shape
    area = height * width
    splits = pixel_splits(batch, outputs, area, 16)
    partial = kept.d.new_empty((splits, 5, batch, outputs))
    launch(
        norm_sums,
        lambda meta: (batch * cdiv(outputs, meta["BLOCK_C"]), splits),
        grad,
        kept.branches,
        kept.batch,
        partial,
        batch,
        area,
        cdiv(area, splits),
        C=outputs,
    )
    planes = kept.d.new_empty((4, batch, outputs))
    slope, d_norms = kept.d.new_empty((2, outputs)), kept.d.new_empty((5, outputs))
    launch(
        norm_coefficients,
        (cdiv(outputs, COEFFICIENT_BLOCKS["BLOCK_C"]),),
        partial,
        kept.batch,
        kept.d,
        *norms.tensors(kept.d),
        planes,
        slope,
        d_norms,
        batch,
        area,
        splits,
        C=outputs,
        **COEFFICIENT_BLOCKS,
    )
    d_branches = torch.empty_like(kept.branches)
    launch(
        norm_blend_grad,
        blend_grid(grad),
        grad,
        kept.branches,
        kept.batch,
        planes,
        slope,
        d_branches,
        batch,
        area,
        C=outputs,
    )
    weights = (weight_gwc, weight_pwc, weight_redundant)
    partial = layer_weight_grad(d_branches, x, weights, None, geometry)[0]
    d_gwc, d_pwc, d_redundant, _ = finish_weight_grads(partial, weights, None, geometry)
    dx = layer_input_grad(d_branches, x, weights, None, None, geometry)
    return dx, d_gwc, d_pwc, d_redundant, d_norms


def empty_kept(x: Tensor, weight_gwc: Tensor, geometry: Geometry) -> Kept:
    """Uninitialised :class:`Kept` for a forward on ``x``."""
    batch, outputs = x.shape[0], weight_gwc.shape[0]
    return Kept(
        empty_channels_last(x, 2 * outputs, *geometry.output_size(x.shape[2], x.shape[3])),
        x.new_empty((batch, outputs), dtype=torch.float32),
        x.new_empty((3, 2, outputs), dtype=torch.float32),
    )
