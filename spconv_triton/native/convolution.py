"""Convolutions of the native path, in channels_last; the 1 x 1 ones are in :mod:`spconv_triton.native.products`.

The layouts and forms here are those that take the least time on a CPU; GPUs take any. Maps are in float32 or better,
but in bfloat16 where a CPU multiplies that and adds in float32: what is read and written then decides its time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import is_watched
from ..geometry import Geometry

ACCUMULATES = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")

MULTIPLIES_BFLOAT16 = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
"""Whether oneDNN has bfloat16 on this processor. It adds in float32, and rounds a result once."""


def map_dtype(x: Tensor) -> torch.dtype:
    """The dtype of maps that are made from ``x``: its own, or float32 where that would be slow or less precise."""
    if x.dtype == torch.bfloat16 and x.is_cpu and MULTIPLIES_BFLOAT16:
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


def are_of_onednn(x: Tensor) -> bool:
    """Whether convolutions of ``x`` are oneDNN's, and maps stay in its dtype."""
    return x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and x.dtype == map_dtype(x)


def channels_last(x: Tensor) -> Tensor:
    """``x`` in the layout whose convolutions are the fast ones on a CPU; GPUs take either."""
    return x.contiguous(memory_format=torch.channels_last) if x.is_cpu else x


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, *window: Any) -> Tensor:
    """A convolution as a new tensor, in the dtype of maps."""
    y = convolution(x, weight, bias, *window)
    return channels_last(y.to(map_dtype(y)))


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """``F.conv2d``, with nothing in it that oneDNN gets wrong."""
    if misses_columns(x, weight, stride, padding, dilation):
        return convolution(x, weight, bias, (stride[0], 1), padding, dilation, groups)[..., :: stride[1]]
    if misses_padding(x, weight, padding, dilation):
        return convolution(padded(x, padding), weight, bias, stride, (0, 0), dilation, groups)
    if misses_rows(x, weight, stride, dilation):
        return convolution(x[:, :, :: stride[0]], weight, bias, (1, stride[1]), padding, dilation, groups)
    x, weight = readable(x, weight, stride, padding, dilation)
    if misses_grouped_gradient(x, groups):
        weight = weight.clone(memory_format=torch.contiguous_format)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def misses_grouped_gradient(x: Tensor, groups: int) -> bool:
    """Whether the gradient of a weight in channels_last may be some number: of groups in a convolution that is ATen's
    own, where one sample's stride over the batch is odd (PyTorch 2.14.1's, and ``nn.Conv2d``'s too)."""
    return groups > 1 and x.is_cpu and not (are_of_onednn(x) and torch.backends.mkldnn.enabled)


def misses_columns(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> bool:
    """Whether the result, or a weight's gradient, is some number or NaN, and memory behind it is overwritten.

    Of bfloat16, where a stride along the row is longer than it, or leads to no second output, on processors with AMX
    (PyTorch 2.14.1's, and ``nn.Conv2d``'s too, in either memory format). Without that stride it is right.
    """
    if stride[1] == 1 or not _may_be_amx(x):
        return False
    return x.shape[3] < stride[1] or columns_without_stride(x, weight, padding, dilation) <= stride[1]


def columns_without_stride(x: Tensor, weight: Tensor, padding: tuple[int, int], dilation: tuple[int, int]) -> int:
    """W_out if the stride were 1."""
    return x.shape[3] + 2 * padding[1] - dilation[1] * (weight.shape[3] - 1)


def misses_rows(x: Tensor, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int]) -> bool:
    """The same of a forward where the kernel is one row, rows have a stride, and taps are apart. Given the rows alone
    that the stride reads, it is right."""
    return weight.shape[2] == 1 and stride[0] > 1 and dilation[1] > 1 and _may_be_amx(x)


def misses_padding(x: Tensor, weight: Tensor, padding: tuple[int, int], dilation: tuple[int, int]) -> bool:
    """Whether the convolution may crash, of a window in the padding; of pixels that are zero it does not."""
    return _may_be_amx(x) and reaches_beyond(weight, padding, dilation)


def reaches_beyond(weight: Tensor, padding: tuple[int, int], dilation: tuple[int, int]) -> bool:
    """Whether a window may lie in the padding as a whole."""
    halves = (spread * (size // 2) for spread, size in zip(dilation, weight.shape[2:], strict=True))
    return any(pad > half for pad, half in zip(padding, halves, strict=True))


def padded(x: Tensor, padding: tuple[int, int]) -> Tensor:
    """[N, C, H + 2 padding, W + 2 padding], zero around ``x``; a negative padding takes pixels away."""
    return F.pad(x, (padding[1], padding[1], padding[0], padding[0]))


def _may_be_amx(x: Tensor) -> bool:
    """Whether a convolution of ``x`` is one of those that oneDNN has for Intel's AMX."""
    return x.dtype == torch.bfloat16 and x.is_cpu


HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"

FEW_CHANNELS = 128 if HAS_AVX512 else 32
"""Up to which x3 is read where it is in x. Of more, with AVX2 alone, oneDNN's convolutions with a stride and dilation
take up to a third longer than those without, the copy of x3 included; with AVX-512 up to a seventh less."""


def representative(
    x: Tensor, weight: Tensor, geometry: Geometry
) -> tuple[Tensor, tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]]:
    """x3 = x[:, :alpha L] for the group-wise convolution, and its stride, padding, dilation and groups.

    Args:
        x: [N, L, H, W], in channels_last on a CPU.
        weight: [M, alpha L / G, k, k].
    """
    if are_of_onednn(x):
        view, window = representative_view(x.shape, weight.shape, geometry)
        if view is not None:
            return x.as_strided(*view), window
    return x.narrow(1, 0, weight.shape[1] * geometry.groups), geometry[1:]  # which takes half the time of an index


def representative_view(
    x: tuple[int, ...], weight: tuple[int, ...], geometry: Geometry
) -> tuple[tuple[Any, Any] | None, tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]]:
    """Shape and strides of x3 in an x of this shape, None for the slice, and the window of its convolution.

    ATen copies a slice of channels. What it need not copy is all of x: where alpha L divides L, a row of W pixels is a
    row of W L / (alpha L) pixels of alpha L channels, and x3 is every L / (alpha L)-th of them. With many channels the
    pixels of x3 lie so far apart that the copy takes less time.
    """
    found = _long_rows(x, weight, geometry) if x[1] <= FEW_CHANNELS else None
    return (None, geometry[1:]) if found is None else (found[:2], found[2])


@functools.lru_cache(maxsize=256)
def _long_rows(x: tuple[int, ...], weight: tuple[int, ...], geometry: Geometry) -> tuple[Any, Any, Any] | None:
    """Shape, strides and window of x3 as pixels of longer rows; None where it is not, or not soundly."""
    _, stride, padding, dilation, groups = geometry
    batch, channels, height, width = x
    count = weight[1] * groups
    ratio, rest = divmod(channels, count)
    shape = (batch, count, height, width * ratio)
    window = ((stride[0], stride[1] * ratio), (padding[0], padding[1] * ratio), (dilation[0], dilation[1] * ratio))
    # Longer rows would have a stride, and taps apart, that misses_columns and misses_rows are about.
    is_missed = geometry.output_size(height, width)[1] == 1 or (weight[2] == 1 and stride[0] > 1)
    if rest or is_missed or not _is_sound(shape, weight, *window):
        return None
    row = width * channels
    return shape, (height * row, 1, row, count), (*window, groups)


def add_convolution(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """``y``, in channels_last on a CPU, plus a convolution, in place."""
    if are_readable(x, weight, stride, padding, dilation) and _can_accumulate(y, x):
        # oneDNN adds in the convolution's epilogue: the operator that Inductor uses for a convolution and a sum.
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            y, x, weight, None, padding, stride, dilation, groups, "add", 1.0, None, [], None
        )
    return y.add_(convolve(x, weight, None, stride, padding, dilation, groups))


def misses_weight_gradient(x: Tensor, weight: Tensor, dilation: tuple[int, int]) -> bool:
    """Whether the weight's gradient in channels_last is NaN, or some number: of bfloat16, with a vertical dilation and
    channels of a group that are no multiple of 16 (PyTorch 2.14.1's, and ``nn.Conv2d``'s too)."""
    return x.is_cpu and x.dtype == torch.bfloat16 and dilation[0] > 1 and weight.shape[1] % 16 != 0


def readable(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    *_: Any,
) -> tuple[Tensor, Tensor]:
    """``x`` and ``weight`` such that oneDNN reads nothing but them: as they are, or else as copies in NCHW.

    Of PyTorch 2.14.1's, the convolutions in channels_last (``nn.Conv2d``'s too) crash where a window lies in the
    padding as a whole, and read what was never written where a group has one channel and there is a stride, and where a
    stride is longer than the map. Of bfloat16 there is more: :func:`misses_columns`, :func:`misses_rows`,
    :func:`misses_padding`.
    """
    if are_readable(x, weight, stride, padding, dilation):
        return x, weight
    return in_nchw(x, weight)


def in_nchw(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of both, which oneDNN reads as NCHW."""
    # Not contiguous(), which leaves what is NCHW and channels_last at once as it is, to be read as the latter.
    return x.clone(memory_format=torch.contiguous_format), weight.clone(memory_format=torch.contiguous_format)


def are_readable(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> bool:
    """Whether oneDNN reads nothing but ``x`` and ``weight`` as they are."""
    if not x.is_cpu:
        return True
    if (
        misses_columns(x, weight, stride, padding, dilation)
        or misses_padding(x, weight, padding, dilation)
        or misses_rows(x, weight, stride, dilation)
    ):
        return False
    try:
        return _is_sound(x.shape, weight.shape, stride, padding, dilation)
    except TypeError:  # sizes that are symbols have no hash
        return _is_sound.__wrapped__(x.shape, weight.shape, stride, padding, dilation)


@functools.lru_cache(maxsize=256)
def _is_sound(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> bool:
    """Whether oneDNN's convolution in channels_last is."""
    if weight_shape[1] == 1 and stride != (1, 1):
        return False
    for size, kernel, step, pad, spread in zip(x_shape[2:], weight_shape[2:], stride, padding, dilation, strict=True):
        if size < step:
            return False
        # Else every centre tap is inside.
        if pad > spread * (kernel - 1) // 2 and not _every_window_reads(size, kernel, step, pad, spread):
            return False
    return True


def _every_window_reads(size: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether along one axis every output position has a tap inside the input."""
    starts = range(-padding, size + padding - dilation * (kernel - 1), stride)
    return all(any(0 <= start + dilation * tap < size for tap in range(kernel)) for start in starts)


def _can_accumulate(y: Tensor, x: Tensor) -> bool:
    """Whether oneDNN convolves into ``y``; not under a dispatch mode (a FLOP counter, fakes): it would not know how."""
    return ACCUMULATES and y.dtype == x.dtype and are_of_onednn(y) and y.numel() > 0 and not is_watched()
