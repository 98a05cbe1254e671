"""Multiply-adds of the operators that a tracer does not see into, for compiled layers: they stay in its graph."""

from __future__ import annotations

from typing import Any

from .. import launch
from ..flop_formulas import flop_formula


@flop_formula(launch.opaque.convolve.packet)
def _(
    x_shape: Any,
    packed: Any,
    ratio: Any,
    scale: Any,
    offset: Any,
    residual: Any,
    representative: int,
    groups: int,
    stride: int,
    activation: str,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    batch, channels, height, width = x_shape
    return _flops(batch * (height // stride) * (width // stride), channels, packed[0], representative, groups)


@flop_formula(launch.opaque.weight_grad.packet)
def _(
    grad_shape: Any,
    x_shape: Any,
    pooled: Any,
    gwc_shape: Any,
    pwc_shape: Any,
    redundant_shape: Any,
    ratio: Any,
    groups: int,
    stride: int,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    batch, outputs, height, width = grad_shape
    return _flops(batch * height * width, x_shape[1], outputs, pwc_shape[1], groups)


@flop_formula(launch.opaque.input_grad.packet)
def _(
    grad_shape: Any,
    packed: Any,
    gate: Any,
    constant: Any,
    representative: int,
    groups: int,
    stride: int,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    batch, outputs, height, width = grad_shape
    return _flops(batch * height * width, packed[1], outputs, representative, groups)


def _flops(pixels: int, channels: int, outputs: int, representative: int, groups: int) -> int:
    """Two per multiply-add of a 3 x 3 layer."""
    return 2 * pixels * outputs * (9 * representative // groups + channels)
