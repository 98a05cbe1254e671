"""The whole layer in one pass: statistics, gate, convolution."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..geometry import Geometry
from ..kernels.arithmetic import cdiv
from ..kernels.gate import gate_planes
from ..kernels.onepass import onepass_forward
from ..kernels.packing import packing_programs
from ..kernels.statistics import window_statistics
from ..kernels.tuning import statistics_blocks
from . import descriptor, opaque
from .common import (
    FEW,
    can_overlap,
    channels_last,
    check_samples,
    empty_output,
    forward_grid,
    layer_constants,
    pixel_arguments,
    pixel_major,
    pixel_splits,
    statistics_precision,
    use_descriptors,
    window_constants,
)
from .launching import launch

BLOCK_ROWS = 16
"""Taps whose sums a program of the statistics makes: all of 3 x 3. With 32, each with its weights, some spill."""

FEW_CO = 4
"""Output channels of a program that makes the gate of one of few samples."""

LONGEST = 8192
"""Weights of an output channel, up to which there are such programs: they are compiled without a loop."""

FORWARD_KERNELS = (window_statistics, gate_planes, onepass_forward)


def spconv2d(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    geometry: Geometry,
    *,
    norm_scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    path: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The layer in three launches: statistics, gate, convolution.

    Args:
        x: [N, L, H, W]; a channel slice of a channels_last tensor is read in place.
        weight_gwc, weight_pwc, weight_redundant: [M, alpha L / G, k, k], [M, alpha L, 1, 1], [M, L - alpha L, 1, 1].
        bias: [M] or None, added after the gate.
        branch_bias: [2, M] or None, added to U3 and U1 before it.
        norm_scale: [M], multiplies beta U3 + gamma U1, before the bias is added.
        residual: [N, M, H_out, W_out], added to the output.
        activation: ``"none"``, ``"relu"``, ``"relu6"`` or ``"silu"``, after the residual.
        path: the convolution's kernel: ``"flat"`` takes any layer, ``"descriptor"`` what
            :func:`.descriptor.supports`, ``"auto"`` the latter where :func:`.descriptor.can_run`.

    Returns:
        Y [N, M, H_out, W_out], channels_last, and what the backward needs: gamma / beta [N, M] float32, the mean of
        what each tap reads [N, k k, alpha L], and of what the point-wise convolutions read [N, L], in the dtype of x.

    Raises:
        ValueError: ``"descriptor"`` for a layer that its kernel does not compute, or an unknown path.
    """
    x, spacing = pixel_major(x)
    batch, channels, height, width = x.shape
    output_size = geometry.output_size(height, width)
    pixels, *sizes = pixel_arguments(x, output_size)
    outputs, representative = weight_pwc.shape[:2]
    check_samples(batch, max(channels, 2 * outputs, geometry.taps * representative), "x", x.shape)
    ratio, scale, offset = (x.new_empty((batch, outputs), dtype=torch.float32) for _ in range(3))
    means = x.new_empty((batch, geometry.taps, representative)), x.new_empty((batch, channels))
    gate = _Gate(ratio, scale, offset, *means)
    if pixels == 0:
        return empty_output(x, weight_gwc, geometry), *gate.kept
    weights = channels_last(weight_gwc), weight_pwc.contiguous(), weight_redundant.contiguous()
    plan = _plan(path, x, weight_gwc, weight_pwc, geometry)
    packing = None if plan is None else _Packing(x.new_empty((outputs, plan.columns)), plan.merge)
    statistics = _window_statistics(x, spacing, weights, packing, output_size, geometry)
    _launch_gate(gate, statistics, weights, (bias, branch_bias, norm_scale), output_size, geometry)
    if packing is not None:
        window = (representative, geometry.groups, geometry.stride[0])
        y = opaque.convolve(x, packing.packed, gate.ratio, gate.scale, gate.offset, residual, *window, activation)
        return y, *gate.kept
    y = empty_output(x, weight_gwc, geometry)
    launch(
        onepass_forward,
        forward_grid(pixels, weight_gwc, geometry),
        x,
        *weights,
        gate.ratio,
        gate.scale,
        gate.offset,
        y if residual is None else channels_last(residual),
        y,
        pixels,
        *sizes,
        spacing,
        C=channels,
        RESIDUAL=residual is not None,
        ACTIVATION=activation,
        **layer_constants(x, weight_gwc, weight_pwc, geometry),
    )
    return y, *gate.kept


class _Gate(NamedTuple):
    """What the gate's launch writes: planes [N, M], and means of what the taps and the point-wise convolutions read."""

    ratio: Tensor
    scale: Tensor
    offset: Tensor
    tap_mean: Tensor  # [N, k k, alpha L]
    pool_mean: Tensor  # [N, L]

    @property
    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the backward needs."""
        return self.ratio, self.tap_mean, self.pool_mean


class _Packing(NamedTuple):
    """The weights as one matrix [M, columns], and how many groups are merged in it."""

    packed: Tensor
    merge: int


def _launch_gate(
    gate: _Gate,
    statistics: tuple[Tensor, int],
    weights: tuple[Tensor, Tensor, Tensor],
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None],
    output_size: tuple[int, int],
    geometry: Geometry,
) -> None:
    """Write ``gate``.

    Args:
        statistics: as of :func:`_window_statistics`.
        weights: group-wise, point-wise and redundant, as the kernels read them.
        vectors: bias, branch bias, and scale of a norm.
        output_size: H_out, W_out.
    """
    partial, pool_row = statistics
    (batch, channels), (outputs, representative) = gate.pool_mean.shape, weights[1].shape[:2]
    few = FEW if geometry.taps * representative // geometry.groups + channels <= LONGEST else 0

    def grid(meta: dict[str, Any]) -> tuple[int]:
        per_group = cdiv(outputs // geometry.groups, meta["BLOCK_CO"])
        return (per_group * geometry.groups * _gate_blocks(batch, few, meta),)

    launch(
        gate_planes,
        grid,
        partial,
        *weights,
        *(gate.ratio if vector is None else vector.contiguous() for vector in vectors),
        *gate,
        batch,
        output_size[0] * output_size[1],
        C=channels,
        CR=representative,
        CO=outputs,
        G=geometry.groups,
        TAPS=geometry.taps,
        ROWS=partial.shape[2],
        POOL_ROW=pool_row,
        SPLITS=partial.shape[0],
        BIAS=vectors[0] is not None,
        BRANCH_BIAS=vectors[1] is not None,
        NORM_SCALE=vectors[2] is not None,
        PRECISION=statistics_precision(gate.pool_mean),
        FEW=few,
        FEW_CO=FEW_CO,
        OVERLAP=can_overlap(gate.pool_mean),
    )


def _gate_blocks(batch: int, few: int, meta: dict[str, Any]) -> int:
    """Programs of the gate that a block of output channels takes.

    By arithmetic, not by a branch: in a graph for every batch ``batch`` is a symbol, and may not be asked.
    """
    blocks = cdiv(batch, meta["BLOCK_N"])
    are_few = torch.sym_max(0, torch.sym_min(1, few + 1 - batch))
    return blocks + are_few * (batch * (meta["BLOCK_CO"] // FEW_CO) - blocks)


def _plan(
    path: str, x: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry
) -> descriptor.Packing | None:
    """How the weights are packed for the descriptor kernel; None on the flat path."""
    if not use_descriptors(path, descriptor, x, weight_gwc, weight_pwc, geometry):
        return None
    return descriptor.packing(x.shape[1], weight_pwc.shape[1], weight_gwc.shape[0], geometry.groups)


def _window_statistics(
    x: Tensor,
    spacing: int,
    weights: tuple[Tensor, Tensor, Tensor],
    packing: _Packing | None,
    output_size: tuple[int, int],
    geometry: Geometry,
) -> tuple[Tensor, int]:
    """Sums over what the taps read, [splits, N, rows, L] float32, and the row of what the point-wise ones read.

    Args:
        weights: group-wise, point-wise and redundant, which are packed.
    """
    batch, channels, height, width = x.shape
    kh, kw = geometry.kernel_size
    outputs, representative = weights[1].shape[:2]
    pooled = geometry.stride != (1, 1)
    rows = geometry.taps + (2 if pooled else 0)
    pool_row = geometry.taps if pooled else (kh // 2) * kw + kw // 2
    # The gate's program has no registers left to load that many parts of float32 at a time.
    splits = pixel_splits(batch, channels, height * width, 8, 64 if x.itemsize < 4 else 256)
    partial = x.new_empty((splits, batch, rows, channels), dtype=torch.float32)
    packs = 0 if packing is None else packing_programs(*packing.packed.shape)
    block_w, block_c = statistics_blocks(width, channels, x.itemsize)
    launch(
        window_statistics,
        (batch * cdiv(channels, block_c) + cdiv(packs, splits), splits, cdiv(rows, BLOCK_ROWS)),
        x,
        partial,
        *weights,
        partial if packing is None else packing.packed,
        batch,
        height,
        width,
        *output_size,
        spacing,
        C=channels,
        ROWS=rows,
        BLOCK_ROWS=BLOCK_ROWS,
        PACK=packing is not None,
        CR=representative,
        CO=outputs,
        G=geometry.groups,
        MERGE=1 if packing is None else packing.merge,
        OVERLAP=can_overlap(x),
        BLOCK_W=block_w,
        BLOCK_C=block_c,
        **window_constants(geometry),
    )
    return partial, pool_row
