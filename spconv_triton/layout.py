"""Memory formats: which one a tensor is in, and which one a padded one, a result or a gradient should have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """``torch.channels_last`` where the channels of [N, C, H, W] lie next to each other, else contiguous.

    A tensor that is both (one channel, or one pixel) is read off its strides, as PyTorch does; so is a slice or a
    crop of a channels_last tensor.
    """
    channels, width = x.shape[1], x.shape[3]
    if x.stride()[1:] == (1, width * channels, channels):
        return torch.channels_last
    if x.stride(1) == 1 and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def padded_by_mode(x: Tensor, padding: tuple[int, int], mode: str) -> Tensor:
    """[N, C, H + 2 padding, W + 2 padding] by a ``padding_mode`` of ``nn.Conv2d``, in the memory format of ``x``."""
    edges = (padding[1], padding[1], padding[0], padding[0])
    return F.pad(x, edges, mode=mode).contiguous(memory_format=memory_format(x))


def gradient_of(parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
    """``gradient`` in the dtype of ``parameter``, and with its strides where only those of dimensions of size 1 differ.

    They say nothing about memory, but DDP compares them, and warns.
    """
    if gradient is None:
        return None
    gradient = gradient.to(parameter.dtype)
    if gradient.stride() == parameter.stride():
        return gradient
    strides = zip(parameter.shape, gradient.stride(), parameter.stride(), strict=True)
    if all(size == 1 or own == wanted for size, own, wanted in strides):
        return gradient.as_strided(parameter.shape, parameter.stride())
    return gradient
