"""The layer in inference, with what follows it, as an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import launch
from ..autocast import cast
from ..flop_formulas import flop_formula
from ..registration import NAMESPACE, register_autocast, traceable_op
from .common import forward_flops, geometry_of


@traceable_op("spconv2d_inference", lambda: launch.layer.FORWARD_KERNELS)
def spconv2d_inference(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    norm_scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Y [N, M, H_out, W_out], channels_last; see :func:`spconv_triton.functional.spconv2d_inference`.

    It has no gradients.
    """
    geometry = geometry_of(weight_gwc, stride, padding, dilation, groups)
    return launch.spconv2d(
        x,
        weight_gwc,
        weight_pwc,
        weight_redundant,
        bias,
        branch_bias,
        geometry,
        norm_scale=norm_scale,
        residual=residual,
        activation=activation,
    )[0]


@spconv2d_inference.register_fake
def _(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    norm_scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return launch.empty_output(x, weight_gwc, geometry_of(weight_gwc, stride, padding, dilation, groups))


def _autocast(*args: Any) -> tuple[Any, ...]:
    x, gwc, pwc, redundant, *others, residual = args[:8]
    x, gwc, pwc, redundant, residual = cast(x, gwc, pwc, redundant, residual)
    return x, gwc, pwc, redundant, *others, residual, *args[8:]


register_autocast(spconv2d_inference, _autocast)


flop_formula(getattr(torch.ops, NAMESPACE).spconv2d_inference)(forward_flops)
