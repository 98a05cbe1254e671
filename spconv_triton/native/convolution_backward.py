"""Gradients of convolutions on the native path, in channels_last: oneDNN's, or over few pixels a matrix product.

oneDNN brings the gradient of a weight into the weight's order after it has computed it in its own, which takes as long
as a hundred or two of pixels do. Over few the gradient is a product with what each tap (i, j) reads, unfolded:

    dW[m, i, j, c] = sum over output pixels p of g[p, m] x[stride p - padding + dilation (i, j), c]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .convolution import (
    columns_without_stride,
    in_nchw,
    misses_columns,
    misses_grouped_gradient,
    misses_padding,
    misses_weight_gradient,
    padded,
    readable,
)
from .products import LARGE_WEIGHT, ONEDNN_IS_WIDER, can_be_matrix_product

FEW_PIXELS = 100 if ONEDNN_IS_WIDER else 200
"""Output pixels of a batch, up to which a weight's gradient is a matrix product; half as many where the gradient of x
is needed too and the weight is small, since oneDNN then makes both in one call."""


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    needed: tuple[bool, ...],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> tuple[Any, Any]:
    """Gradients of ``F.conv2d(x, weight, None, stride, ...)`` by ``x`` and ``weight``, where ``needed``.

    Args:
        grad: [N, M, H_out, W_out], of the dtype of x.
        x: [N, C, H, W].
        weight: [M, C / groups, kh, kw].
    """
    unfolded = None
    if needed[1] and unfolding_pays(grad, x, weight.numel(), alone=not needed[0]):
        unfolded = _unfolded_gradient(grad, x, weight, stride, padding, dilation, groups)
        needed = needed[0], False
        if not needed[0]:
            return None, unfolded
    if misses_padding(x, weight, padding, dilation):
        of_x, of_weight = convolution_backward(
            grad, padded(x, padding), weight, needed, stride, (0, 0), dilation, groups
        )
        return None if of_x is None else padded(of_x, (-padding[0], -padding[1])), of_weight
    if misses_columns(x, weight, stride, padding, dilation):  # without a stride the other outputs have no gradient
        taken = grad
        grad = taken.new_zeros((*taken.shape[:3], columns_without_stride(x, weight, padding, dilation)))
        grad[..., :: stride[1]] = taken
        stride = stride[0], 1
    if needed[1] and misses_weight_gradient(x, weight, dilation):
        x, weight = in_nchw(x, weight)
    else:
        x, weight = readable(x, weight, stride, padding, dilation)
    if needed[1] and misses_grouped_gradient(x, groups):
        weight = weight.clone(memory_format=torch.contiguous_format)
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (*needed, False)
    )
    return of_x, of_weight if unfolded is None else unfolded


def unfolding_pays(grad: Tensor, x: Tensor, weights: int, *, alone: bool) -> bool:
    """Whether the gradient of so many weights takes less time as a matrix product, without that of ``x`` or with it."""
    few = FEW_PIXELS if alone or weights >= LARGE_WEIGHT else FEW_PIXELS // 2
    pixels = grad.shape[0] * grad.shape[2] * grad.shape[3]
    return 0 < pixels <= few and x.dtype == torch.float32 and can_be_matrix_product(x)


def _unfolded_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """The weight's gradient, [M, C / groups, kh, kw] in channels_last."""
    outputs, inputs, kh, kw = weight.shape
    batch, _, height, width = grad.shape
    framed = padded(x, padding).permute(0, 2, 3, 1)
    of_sample, of_row, of_pixel, of_channel = framed.stride()
    of_output, of_tap = ((of_row * step[0], of_pixel * step[1]) for step in (stride, dilation))
    shape = (groups, batch, height, width, kh, kw, inputs)
    read = framed.as_strided(shape, (inputs * of_channel, of_sample, *of_output, *of_tap, of_channel))
    unfolded = read.reshape(groups, batch * height * width, kh * kw * inputs)
    of_groups = grad.permute(0, 2, 3, 1).reshape(-1, groups, outputs // groups).permute(1, 2, 0)
    return torch.bmm(of_groups, unfolded).view(outputs, kh, kw, inputs).permute(0, 3, 1, 2)
