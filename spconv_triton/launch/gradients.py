"""Input and weight gradients, of the gated layer and of the representative branch alone."""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..geometry import Geometry
from ..kernels.arithmetic import cdiv, next_power_of_2
from ..kernels.backward import input_grad, weight_grad
from ..kernels.pooling import pool_windows
from ..kernels.reduction import finish_weights, gate_grad
from ..kernels.tuning import weight_blocks, weight_grad_channels
from . import gradients_descriptor as descriptor
from . import opaque
from .common import (
    TARGET_PROGRAMS,
    channels_last,
    empty_channels_last,
    is_hopper,
    layer_constants,
    pixel_major,
    statistics_precision,
    use_descriptors,
)
from .gradients_descriptor import Prepared
from .launching import launch

BLOCK_PLANE = 16
"""Channels of a program that makes the constant of :mod:`..kernels.backward_descriptor`: it has nine taps of each."""

BLOCK_PLANE_N = 16
"""Samples of such a program."""

BLOCK_PLANE_CO = 32
"""Output channels of its steps, each of which waits for memory."""

BLOCK_N = 16
"""Samples of a step of the programs that finish weights."""

BLOCK_ROWS, BLOCK_COLUMNS = 32, 128
"""Of a program that packs weights."""

BLOCK_PIX = 32
"""Pixels of a program that averages windows: each loads as many as a stride has, of up to 64 channels."""

KERNELS = (pool_windows, weight_grad, gate_grad, finish_weights, input_grad)

Weights = tuple[Tensor, Tensor, Tensor | None]
"""Group-wise, point-wise and redundant weight; the branch alone has no redundant one."""


class GateGrad(NamedTuple):
    """What the gate adds to the gradients of everything that it was computed from."""

    shift: Tensor  # delta / P, [N, M] float32
    terms: Tensor | None  # each sample's part of the branch biases' gradient, [2, N, M] float32
    branch_bias: Tensor | None
    tap_mean: Tensor  # as the forward kept them
    pool_mean: Tensor
    pixels: int  # P


def layer_input_grad(
    grad: Tensor, x: Tensor, weights: Weights, ratio: Tensor | None, shift: Tensor | None, geometry: Geometry
) -> Tensor:
    """dL/dx, [N, C, H, W], channels_last; ``ratio`` and ``shift`` are None for the branch without a gate."""
    weight_gwc, weight_pwc, weight_redundant = weights
    batch, channels, height, width = x.shape
    representative = weight_pwc.shape[1]
    stride_h, stride_w = geometry.stride
    dx = empty_channels_last(x, channels, height, width)
    if dx.numel() == 0:
        return dx
    grad = channels_last(grad)
    phase_pixels = cdiv(height, stride_h) * cdiv(width, stride_w)
    constants = layer_constants(x, weight_gwc, weight_pwc, geometry)
    # Float32 without tensor cores has no product in flight. Without the gate it would spill 8 bytes of odd channels if
    # it were treated as if it had, and with it 8 bytes at a stride if it were not.
    in_flight = ratio is not None or x.dtype != torch.float32 or constants["PRECISION"] != "ieee"

    def grid(meta: dict[str, Any]) -> tuple[int]:
        blocks = geometry.groups * cdiv(representative // geometry.groups, meta["BLOCK_C"])
        blocks += cdiv(channels - representative, meta["BLOCK_C"])
        return (blocks * cdiv(phase_pixels, meta["BLOCK_PIX"]) * stride_h * stride_w * batch,)

    launch(
        input_grad,
        grid,
        grad,
        channels_last(weight_gwc),
        weight_pwc.contiguous(),
        weight_pwc if weight_redundant is None else weight_redundant.contiguous(),
        grad if ratio is None else ratio,
        grad if shift is None else shift,
        dx,
        phase_pixels,
        height,
        width,
        grad.shape[2],
        grad.shape[3],
        C=channels,
        TAP_STEP_H=stride_h // gcd(stride_h, geometry.dilation[0]),
        TAP_STEP_W=stride_w // gcd(stride_w, geometry.dilation[1]),
        GATED=ratio is not None,
        HOPPER=is_hopper(x) and in_flight,
        **constants,
    )
    return dx


def pooled_windows(x: Tensor, output: tuple[int, int], geometry: Geometry) -> Tensor | None:
    """What the point-wise convolutions read at a stride, [N, C, H_out, W_out], channels_last; None at stride 1."""
    if geometry.stride == (1, 1):
        return None
    channels, height, width = x.shape[1:]
    x, spacing = pixel_major(x)
    pooled = empty_channels_last(x, channels, *output)
    pixels = x.shape[0] * output[0] * output[1]
    block = min(64, max(16, next_power_of_2(channels)))
    launch(
        pool_windows,
        (cdiv(channels, block) * cdiv(pixels, BLOCK_PIX),),
        x,
        pooled,
        pixels,
        height,
        width,
        *output,
        spacing,
        C=channels,
        STRIDE_H=geometry.stride[0],
        STRIDE_W=geometry.stride[1],
        CENTRE_H=geometry.centre[0],
        CENTRE_W=geometry.centre[1],
        BLOCK_PIX=BLOCK_PIX,
        BLOCK_C=block,
    )
    return pooled


def layer_weight_grad(
    grad: Tensor, x: Tensor, weights: Weights, ratio: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor, int]:
    """Partial sums of the weight gradients, parts of A1 and A3, and how many of the latter's K blocks are A1's.

    The partial sums lack the gate's own term and are [splits, weights] float32, in the order redundant, point-wise,
    group-wise; the parts are [K blocks, N, slices, M] float32, or empty where ``ratio`` is None.
    """
    weight_gwc, weight_pwc, weight_redundant = weights
    batch, channels, height, width = x.shape
    outputs, representative = weight_pwc.shape[:2]
    count = sum(w.numel() for w in weights if w is not None)
    pixels = grad.shape[2] * grad.shape[3]
    pooled = pooled_windows(x, (grad.shape[2], grad.shape[3]), geometry)
    grad, (x, spacing) = channels_last(grad), pixel_major(x)
    block = weight_grad_channels(representative // geometry.groups)
    redundant_blocks = cdiv(channels - representative, block)
    k_blocks = redundant_blocks + cdiv(representative, block)
    k_blocks += geometry.taps * cdiv(representative // geometry.groups, block)
    # Enough programs to fill a GPU, of at least 1024 pixels each; a slice lies within one sample, for the gate's sake.
    tiles = k_blocks * cdiv(outputs, 64)
    splits = max(1, min(cdiv(TARGET_PROGRAMS, tiles), cdiv(batch * pixels, 1024)))
    slices = cdiv(splits, batch)
    units = batch * slices
    partial = x.new_empty((splits, count), dtype=torch.float32)
    inner = x.new_empty((k_blocks, batch, slices, outputs) if ratio is not None else 0, dtype=torch.float32)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return k_blocks * geometry.groups * cdiv(outputs // geometry.groups, meta["BLOCK_CO"]), splits

    launch(
        weight_grad,
        grid,
        grad,
        x,
        x if pooled is None else pooled,
        channels_last(weight_gwc),
        weight_pwc.contiguous(),
        weight_pwc if weight_redundant is None else weight_redundant.contiguous(),
        grad if ratio is None else ratio,
        partial,
        inner,
        units,
        cdiv(units, splits),
        cdiv(pixels, slices),
        height,
        width,
        grad.shape[2],
        grad.shape[3],
        spacing,
        slices,
        C=channels,
        GATED=ratio is not None,
        BLOCK_C=block,
        **layer_constants(x, weight_gwc, weight_pwc, geometry),
    )
    return partial, inner, redundant_blocks


def gate_gradient(
    grad: Tensor,
    parts: Tensor,
    redundant_blocks: int,
    ratio: Tensor,
    branch_bias: Tensor | None,
    tap_mean: Tensor,
    pool_mean: Tensor,
    prepared: Prepared | None = None,
) -> GateGrad:
    """The gate's own gradient, from the parts of A1 and A3 that :func:`layer_weight_grad` left.

    Args:
        prepared: for the input gradient over descriptors; its ``gate`` is written.
    """
    batch, outputs = ratio.shape
    pixels = grad.shape[2] * grad.shape[3]
    shift = torch.empty_like(ratio)
    terms = None if branch_bias is None else ratio.new_empty((2, batch, outputs))
    block = min(64, next_power_of_2(outputs))
    launch(
        gate_grad,
        (cdiv(outputs, block) * batch,),
        parts,
        ratio,
        ratio if branch_bias is None else channels_last(grad),
        ratio if branch_bias is None else branch_bias.contiguous(),
        shift,
        ratio if terms is None else terms,
        ratio if prepared is None else prepared.gate,
        batch,
        pixels,
        parts.shape[2],
        CO=outputs,
        K_BLOCKS=parts.shape[0],
        REDUNDANT_BLOCKS=redundant_blocks,
        BRANCH_BIAS=branch_bias is not None,
        PREPARE=prepared is not None,
        BLOCK_ROWS=16,
        BLOCK_CO=block,
    )
    return GateGrad(shift, terms, branch_bias, tap_mean, pool_mean, pixels)


def finish_weight_grads(
    partial: Tensor,
    weights: Weights,
    of_gate: GateGrad | None,
    geometry: Geometry,
    prepared: Prepared | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the group-wise, point-wise and redundant weight and of the branch bias, from partial sums.

    In the weights' dtypes and strides; empty where there is no such parameter.

    Args:
        prepared: for the input gradient over descriptors; the rest of it is written. ``partial`` is then that path's.
    """
    weight_gwc, weight_pwc, weight_redundant = weights
    outputs, representative = weight_pwc.shape[:2]
    redundant = 0 if weight_redundant is None else weight_redundant.shape[1]
    channels = representative + redundant
    d_gwc, d_pwc = torch.empty_like(weight_gwc), torch.empty_like(weight_pwc)
    d_redundant = weight_pwc.new_empty(0) if weight_redundant is None else torch.empty_like(weight_redundant)
    group_outputs, group_channels = outputs // geometry.groups, representative // geometry.groups
    block_co, block_c = weight_blocks(group_outputs, group_channels)
    k_blocks = cdiv(redundant, block_c) + cdiv(representative, block_c)
    k_blocks += geometry.taps * cdiv(group_channels, block_c)
    programs = cdiv(group_outputs, block_co) * geometry.groups * k_blocks
    # Where a part is missing the kernel reads nothing of it, and any tensor will do.
    shift, tap_mean, pool_mean, batch, pixels = partial, weight_pwc, weight_pwc, 1, 1
    terms, d_branch_bias, bias_strides = partial, weight_pwc.new_empty((0, outputs)), (0, 0)
    if of_gate is not None:
        shift, tap_mean, pool_mean, pixels = of_gate.shift, of_gate.tap_mean, of_gate.pool_mean, of_gate.pixels
        batch = shift.shape[0]
        if of_gate.branch_bias is not None and of_gate.terms is not None:
            terms, d_branch_bias = of_gate.terms, torch.empty_like(of_gate.branch_bias)
            bias_strides = d_branch_bias.stride(0), d_branch_bias.stride(1)
    kept, packed, constant = (weight_pwc, weight_pwc, weight_pwc), weight_pwc, partial
    plan, stride, centre = None, 1, -1
    if prepared is not None and weight_redundant is not None:
        kept = channels_last(weight_gwc), weight_pwc.contiguous(), weight_redundant.contiguous()
        packed, constant, plan, stride = prepared.packed, prepared.constant, prepared.plan, geometry.stride[0]
        centre = 4 if geometry.stride == (1, 1) else -1
        c_blocks = geometry.groups * cdiv(group_channels, BLOCK_PLANE) + cdiv(redundant, BLOCK_PLANE)
        programs += c_blocks * cdiv(constant.shape[1], BLOCK_PLANE_N)
        programs += cdiv(plan.rows, BLOCK_ROWS) * cdiv(channels, BLOCK_COLUMNS)
    launch(
        finish_weights,
        (programs,),
        partial,
        shift,
        tap_mean,
        pool_mean,
        terms,
        d_gwc,
        d_pwc,
        d_pwc if weight_redundant is None else d_redundant,
        partial if terms is partial else d_branch_bias,
        *kept,
        packed,
        constant,
        batch,
        pixels,
        partial.shape[0],
        *d_gwc.stride(),
        *d_pwc.stride()[:2],
        *((0, 0) if weight_redundant is None else d_redundant.stride()[:2]),
        *bias_strides,
        C=channels,
        CR=representative,
        CO=outputs,
        G=geometry.groups,
        KH=geometry.kernel_size[0],
        KW=geometry.kernel_size[1],
        GATED=of_gate is not None,
        BRANCH_BIAS=terms is not partial,
        PREPARE=plan is not None,
        ROWS=0 if plan is None else plan.rows,
        MERGE=1 if plan is None else plan.merge,
        MIXED=plan is not None and plan.mixed,
        STRIDE=stride,
        CENTRE=centre,
        PRECISION=statistics_precision(weight_pwc),
        BLOCK_N=BLOCK_N,
        BLOCK_CO=block_co,
        BLOCK_C=block_c,
        BLOCK_PLANE_N=BLOCK_PLANE_N,
        BLOCK_PLANE=BLOCK_PLANE,
        BLOCK_PLANE_CO=BLOCK_PLANE_CO,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
    )
    return d_gwc, d_pwc, d_redundant, d_branch_bias


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
    geometry: Geometry,
    *,
    path: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (channels_last), the three weights, and the branch bias ([0, M] where there is none).

    Args:
        grad: dL/dY, [N, M, H_out, W_out].
        ratio, tap_mean, pool_mean: as :func:`spconv_triton.launch.spconv2d` returned them.
        path: ``"auto"``, ``"flat"`` or ``"descriptor"``, as of :func:`spconv_triton.launch.spconv2d`.

    Raises:
        ValueError: ``"descriptor"`` for a layer that its kernels do not compute, or an unknown path.
    """
    weights = (weight_gwc, weight_pwc, weight_redundant)
    if grad.numel() == 0:
        no_bias = grad.new_empty((0, grad.shape[1])) if branch_bias is None else torch.zeros_like(branch_bias)
        dx = empty_channels_last(x, *x.shape[1:]).zero_()
        d_gwc, d_pwc, d_redundant = map(torch.zeros_like, (weight_gwc, weight_pwc, weight_redundant))
        return dx, d_gwc, d_pwc, d_redundant, no_bias
    if not use_descriptors(path, descriptor, x, weight_gwc, weight_pwc, geometry):
        partial, parts, redundant_blocks = layer_weight_grad(grad, x, weights, ratio, geometry)
        of_gate = gate_gradient(grad, parts, redundant_blocks, ratio, branch_bias, tap_mean, pool_mean)
        d_weights = finish_weight_grads(partial, weights, of_gate, geometry)
        return layer_input_grad(grad, x, weights, ratio, of_gate.shift, geometry), *d_weights
    stride = geometry.stride[0]
    pooled = pooled_windows(x, (grad.shape[2], grad.shape[3]), geometry)
    partial, parts = opaque.weight_grad(grad, x, pooled, *weights, ratio, geometry.groups, stride)
    redundant_blocks = descriptor.redundant_tiles(x, weight_pwc, geometry.groups)
    prepared = descriptor.prepare(x, weight_pwc, geometry.groups)
    of_gate = gate_gradient(grad, parts, redundant_blocks, ratio, branch_bias, tap_mean, pool_mean, prepared)
    d_weights = finish_weight_grads(partial, weights, of_gate, geometry, prepared)
    return opaque.input_grad(grad, *prepared[1:], weight_pwc.shape[1], geometry.groups, stride), *d_weights
