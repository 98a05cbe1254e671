"""A batch in parts, each of which goes through the layer while its maps are in the processor's cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CACHED = 16 << 20
"""Bytes of x and Y that samples which go through the layer together have at most, unless it is a single one."""


def samples_together(x: Tensor, outputs: int, size: tuple[int, int]) -> int:
    """How many samples of ``x`` go through the layer together, where Y is [N, ``outputs``, *``size``]."""
    return samples_of_shape(x.shape, x.itemsize, outputs, size) if x.is_cpu else x.shape[0]


def samples_of_shape(shape: tuple[int, ...], itemsize: int, outputs: int, size: tuple[int, int]) -> int:
    """The same of an x on a CPU of this shape, and so many bytes an element."""
    batch, channels, height, width = shape
    elements = batch * (channels * height * width + outputs * size[0] * size[1])
    parts = max(1, min(batch, -(-elements * itemsize // CACHED)))
    return -(-batch // parts)


def parts_of(maps: Tensor | None, samples: int, batch: int) -> Sequence[Tensor | None]:
    """Views of so many samples each of ``maps``, [batch, ...]; where there are none, as many times None."""
    return [None] * -(-batch // samples) if maps is None else maps.split(samples)


def pay_in_training(dtype: torch.dtype) -> bool:
    """Whether parts take less time with gradients too: up to two fifths less where maps are large and samples many.

    In half precision they take a little more: maps have half the bytes, and calls are as long.
    """
    return dtype.itemsize >= 4
