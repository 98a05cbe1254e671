"""A network to convert, and what its conversion reports."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spconv_triton import convert
from spconv_triton.conversion import Conversion


class Block(nn.Module):
    """A stem that reads an image, two 3 x 3 convolutions, a 1 x 1 one, and a head that is no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1))
        self.narrow = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.narrow(self.body(self.stem(x))).mean((2, 3)))


def report_of(model: nn.Module, *args: Any, **kwargs: Any) -> Conversion:
    reports: list[Conversion] = []
    convert(model, *args, **kwargs, report=reports.append)
    (report,) = reports
    return report


def reasons(report: Conversion) -> dict[str, str]:
    return {decision.names[0]: decision.reason for decision in report.kept}


def swapped(report: Conversion) -> list[str]:
    return [decision.names[0] for decision in report.swapped]


def snapshot(model: nn.Module) -> list[tuple[str, int, str]]:
    """Which objects a network is made of, and how they print."""
    modules = [(name, id(module), repr(module)) for name, module in model.named_modules(remove_duplicate=False)]
    return modules + [(name, id(p), str(p._version)) for name, p in model.named_parameters(remove_duplicate=False)]
