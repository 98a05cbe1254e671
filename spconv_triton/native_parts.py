"""A batch in parts, each of which goes through the layer while its maps are in the processor's cache."""

from __future__ import annotations

import torch
from torch import Tensor

CACHED = 16 << 20
"""Bytes of x and Y that samples which go through the layer together have at most, unless it is a single one."""


def samples_together(x: Tensor, outputs: int) -> int:
    """How many samples of ``x`` go through the layer together, on a CPU, where Y has so many elements."""
    batch = x.shape[0]
    if not x.is_cpu:
        return batch
    parts = max(1, min(batch, -(-(x.numel() + outputs) * x.itemsize // CACHED)))
    return -(-batch // parts)


def pay_in_training(dtype: torch.dtype) -> bool:
    """Whether parts take less time with gradients too: a sixth to half of it where maps are large and samples many.

    In half precision they take a little more: maps have half the bytes, and calls as long.
    """
    return dtype.itemsize >= 4
