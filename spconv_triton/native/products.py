"""The products of pixels and point-wise weights on the native path: ATen's matrix products, or oneDNN.

In channels_last a 1 x 1 convolution is a product over pixels, and reads and writes slices of channels where they are.
Which of the two takes less time depends on its size, and on the processor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import is_watched
from . import convolution
from .convolution import add_convolution, convolve

LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _flags() -> dict[str, Any]:
    """What the processor has; nothing of a PyTorch that does not tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def is_of_intel() -> bool:
    """Whether MKL, which is behind ATen's matrix products, uses all that the processor has: SSE4a tells AMD's."""
    flags = _flags()
    return flags.get("avx2", False) and not flags.get("sse4a", True) and torch.backends.mkl.is_available()


def onednn_is_wider() -> bool:
    """Whether oneDNN multiplies twice as many numbers at once as MKL.

    Of AMD's processors MKL uses 256 bits. Since Zen 5, which AVX-VNNI tells from Zen 4, they multiply 512 at once.
    """
    flags = _flags()
    of_amd = all(flags.get(name, False) for name in ("sse4a", "avx_vnni", "avx512_f"))
    return of_amd and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


ONEDNN_IS_WIDER = onednn_is_wider()
"""Then ATen's products of float32 matrices take twice the time of oneDNN's convolutions."""

LARGE_PRODUCT = 10e6 if ONEDNN_IS_WIDER else float("inf") if is_of_intel() else 16e6
"""Multiply-accumulates from which oneDNN's products take less time than ATen's, though they copy a slice: on Intel's
processors none do."""

LARGE_WEIGHT = 1 << 17
"""Elements from which it does so from an eighth of those multiply-accumulates on."""


def is_large(rows: int, weight: Tensor) -> bool:
    """Whether the product of so many rows and ``weight`` is for oneDNN."""
    products = rows * weight.numel()
    return products > LARGE_PRODUCT or (weight.numel() >= LARGE_WEIGHT and products > LARGE_PRODUCT / 8)


def pointwise(x: Tensor, weight: Tensor, first: int = 0) -> Tensor:
    """A 1 x 1 convolution of the channels from ``first`` on, as a new tensor in the dtype of maps; without gradients.

    Args:
        x: [N, L, H, W], in channels_last and dense on a CPU.
        weight: [M, C, 1, 1], C <= L - first.
    """
    outputs, inputs = weight.shape[:2]
    if not is_matrix_product(x, weight.numel()):
        return convolve(x.narrow(1, first, inputs), weight)
    read, matrix = columns(x, first, inputs), weight.flatten(1)
    if LINEAR and x.dtype == torch.float32 and is_large(read.shape[0], matrix):
        y = torch.ops.mkldnn._linear_pointwise(read, matrix, None, "none", [], "")
    else:
        y = torch.mm(read, matrix.t())
    return maps(y, (x.shape[0], outputs, *x.shape[2:]))


def plus_pointwise(y: Tensor, x: Tensor, weight: Tensor, first: int = 0) -> Tensor:
    """``y``, [N, M, H, W] in channels_last and dense on a CPU, plus :func:`pointwise`: in its memory or new, and then
    ``y`` is as it was."""
    outputs, inputs = weight.shape[:2]
    if y.dtype == x.dtype and can_be_matrix_product(x):
        written, read, matrix = columns(y, 0, outputs), columns(x, first, inputs), weight.flatten(1)
        if is_matrix_product(x, weight.numel()):
            written.addmm_(read, matrix.t())
            return y
        if LINEAR and weight.numel() >= LARGE_WEIGHT:
            return maps(torch.ops.mkldnn._linear_pointwise.binary(read, written, matrix, None, "add"), y.shape)
    return add_convolution(y, x.narrow(1, first, inputs), weight)


def is_matrix_product(x: Tensor, weights: int) -> bool:
    """Whether a 1 x 1 convolution of ``x`` by so many weights is a matrix product over pixels.

    On a CPU that takes less time than oneDNN's, by half where channels are few or a slice. Large ones of float32 do not
    where :data:`ONEDNN_IS_WIDER`.
    """
    return can_be_matrix_product(x) and not takes_convolutions(x.dtype, x.numel() // x.shape[1] * weights)


def takes_convolutions(dtype: torch.dtype, products: int) -> bool:
    """Whether so many multiply-accumulates are oneDNN's rather than ATen's."""
    return ONEDNN_IS_WIDER and dtype == torch.float32 and products > LARGE_PRODUCT


def can_be_matrix_product(x: Tensor) -> bool:
    """Whether it can be one.

    Not under a dispatch mode: FLOP counters know convolutions, not products in place. Nor where products of float32
    matrices may be bfloat16's, as those of a convolution are not.
    """
    return x.is_cpu and not is_watched() and are_products_precise(x.dtype)


def are_products_precise(dtype: torch.dtype) -> bool:
    """Whether matrix products on a CPU are as precise as convolutions, whatever they are allowed to be.

    ``torch.get_float32_matmul_precision`` is an error where a precision was set by ``torch.backends``.
    """
    if dtype == torch.float32:
        return torch.backends.mkldnn.matmul.fp32_precision != "bf16"  # type: ignore[attr-defined]
    return dtype == torch.float64 or (dtype == torch.bfloat16 and convolution.MULTIPLIES_BFLOAT16)


def pixels(x: Tensor) -> Tensor:
    """[N, C, H, W] in channels_last, dense, as [N, H W, C]: one view instead of two."""
    batch, channels, height, width = x.shape
    count = height * width
    return x.as_strided((batch, count, channels), (count * channels, channels, 1))


def columns(x: Tensor, first: int, count: int) -> Tensor:
    """``count`` channels of [N, C, H, W] in channels_last, dense, as [N H W, count]: one view instead of four."""
    batch, channels, height, width = x.shape
    return x.as_strided((batch * height * width, count), (channels, 1), x.storage_offset() + first)


def maps(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[N H W, C] as [N, C, H, W] = ``shape`` in channels_last, a view of a dense tensor."""
    _, channels, height, width = shape
    row = width * channels
    return rows.as_strided(shape, (height * row, 1, row, channels))
