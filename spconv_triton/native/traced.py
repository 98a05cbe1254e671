"""Parts of the layer as ``torch.compile`` is to see them: whatever layouts Inductor and the partitioner choose."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import without_autocast
from ..dispatch import is_exporting
from ..registration import traceable_op
from .convolution import (
    misses_columns,
    misses_grouped_gradient,
    misses_rows,
    misses_weight_gradient,
    padded,
    reaches_beyond,
)


def part(x: Tensor) -> Tensor:
    """x3 or x1 as a map of its own: Inductor would copy the slice of channels for each convolution that reads it."""
    return x.contiguous(memory_format=torch.channels_last) if x.is_cpu and not is_exporting() else x


def convolution(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """``F.conv2d``, with nothing in it that oneDNN gets wrong in channels_last.

    That is what :func:`spconv_triton.native.convolution.readable` lists: here padding becomes pixels, and of a
    convolution without a stride some outputs are taken, as where it :func:`misses_columns`; where it
    :func:`misses_rows`, rows are taken before; and what :func:`misses_weight_gradient` is of float32.
    """
    if x.is_cpu:
        if misses_grouped_gradient(x, groups):
            weight = weight.contiguous()
        if torch.is_grad_enabled() and not is_exporting() and misses_weight_gradient(x, weight, dilation):
            with without_autocast(x):
                return convolution(x.float(), weight.float(), stride, padding, dilation, groups).to(x.dtype)
        if reaches_beyond(weight, padding, dilation):
            x, padding = padded(x, padding), (0, 0)
        # What is exported may have any size, and no backward, which is all that gets a short row wrong.
        is_short = not is_exporting() and any(size < step for size, step in zip(x.shape[2:], stride, strict=True))
        is_column = not is_exporting() and misses_columns(x, weight, stride, padding, dilation)
        if misses_rows(x, weight, stride, dilation) and not is_column:
            x, stride = x[:, :, :: stride[0]], (1, stride[1])
        if stride != (1, 1) and (weight.shape[1] == 1 or is_short or is_column):
            y = F.conv2d(x, weight, None, (1, 1), padding, dilation, groups)
            return y[:, :, :: stride[0], :: stride[1]]
    return F.conv2d(x, weight, None, stride, padding, dilation, groups)


@traceable_op("native_gap_softmax_fusion", kernels=tuple)
def gap_softmax_fusion(u3: Tensor, u1: Tensor) -> Tensor:
    """Y = beta U3 + gamma U1, all of them [N, M, H_out, W_out], with U3 - U1 in the backward.

    That depends on no gradient, so the partitioner has the forward make and keep it, one map. What autograd derives
    from the reference has the sums of g U3 and of g U1, and keeps both. With P pixels:

        shift = beta gamma sum_pixels g (U3 - U1) / P,   dL/dU3 = beta g + shift,   dL/dU1 = gamma g - shift
    """
    beta, gamma = _gate(u3, u1)
    return (beta * u3 + gamma * u1).to(u3.dtype)


@gap_softmax_fusion.register_fake
def _(u3: Tensor, _: Tensor) -> Tensor:
    return torch.empty_like(u3)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001, by name
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    u3, u1 = ctx.saved_tensors
    beta, gamma = _gate(u3, u1)
    g = grad.to(beta.dtype)
    shift = beta * gamma * (g * (u3 - u1)).sum((2, 3), keepdim=True) / (g.shape[2] * g.shape[3])
    return (beta * g + shift).to(u3.dtype), (gamma * g - shift).to(u1.dtype)


gap_softmax_fusion.register_autograd(_autograd, setup_context=_save)


def _gate(u3: Tensor, u1: Tensor) -> tuple[Tensor, Tensor]:
    """beta and gamma, [N, M, 1, 1], in float32 or better; NaN where the softmax is, with an infinity in both."""
    precise = torch.promote_types(u3.dtype, torch.float32)
    s3, s1 = (u.mean((2, 3), keepdim=True, dtype=precise) for u in (u3, u1))
    d = s3 - s1 + 0 * torch.maximum(s3, s1)
    return torch.sigmoid(d), torch.sigmoid(-d)
