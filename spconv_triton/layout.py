"""Memory formats: which one a tensor is in, and which one a result should keep."""

from __future__ import annotations

import torch
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
