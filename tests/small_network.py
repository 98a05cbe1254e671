"""A small network of somebody else's, converted: plain and strided layers, batch norms, in-place ReLUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spconv_triton import SPConv2d, convert

CLASSES = 5


def small_network(**options: Any) -> nn.Sequential:
    """For images of any size; ``options`` as of :func:`spconv_triton.convert`."""
    network = convert(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 12, 3, 2, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(inplace=True),
            nn.Conv2d(12, 12, 3, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, CLASSES),
        ),
        **options,
    )
    assert sum(isinstance(module, SPConv2d) for module in network.modules()) == 2
    return network


def images(batch: int = 4, size: tuple[int, int] = (9, 8), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, *size, dtype=dtype)
