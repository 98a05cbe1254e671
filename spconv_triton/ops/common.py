"""What the operators of a layer share: the window, and the multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..geometry import Geometry


def geometry_of(
    weight_gwc: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Geometry:
    """The window of an operator, which takes lists, as schemas have them."""
    kh, kw = weight_gwc.shape[2:]
    return Geometry((kh, kw), (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)


def branch_flops(x_shape: Sequence[int], gwc_shape: Sequence[int], window: tuple[Any, ...]) -> int:
    """Two per multiply-add of the group-wise and the point-wise convolution."""
    outputs, per_group, kh, kw = gwc_shape
    stride, padding, dilation, groups = window
    height, width = Geometry((kh, kw), stride, padding, dilation, groups).output_size(x_shape[2], x_shape[3])
    return 2 * x_shape[0] * height * width * outputs * (kh * kw * per_group + x_shape[1])


def layer_flops(
    x_shape: Sequence[int], gwc_shape: Sequence[int], redundant_shape: Sequence[int], window: tuple[Any, ...]
) -> int:
    """Two per multiply-add of the layer's convolutions."""
    representative = (x_shape[0], x_shape[1] - redundant_shape[1], *x_shape[2:])
    stride, padding, dilation, groups = window
    kernel_size = (gwc_shape[2], gwc_shape[3])
    height, width = Geometry(kernel_size, stride, padding, dilation, groups).output_size(*x_shape[2:])
    pointwise = 2 * x_shape[0] * height * width * redundant_shape[0] * redundant_shape[1]
    return branch_flops(representative, gwc_shape, window) + pointwise


def forward_flops(x: Any, gwc: Any, _pwc: Any, redundant: Any, *rest: Any, **_: Any) -> int:
    """A formula for operators whose arguments begin with a layer's x and weights, and end with its window."""
    return layer_flops(x, gwc, redundant, rest[-4:])


def backward_flops(_grad: Any, *arguments: Any, **_: Any) -> int:
    """Of their backwards."""
    return 2 * forward_flops(*arguments)
