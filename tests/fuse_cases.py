"""Small networks to fuse, and what is demanded of each: what folds, and that results stay what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from cases import assert_within_budget
from torch import Tensor, nn

from spconv_triton import SPConv2d, fuse
from spconv_triton.fused import FusedSPConv2d
from spconv_triton.fusing import Fusion

CHANNELS = 8


def layer(channels: int = CHANNELS, **options: Any) -> SPConv2d:
    return SPConv2d(channels, channels, 3, padding=1, **options)


def norm(**options: Any) -> nn.BatchNorm2d:
    """With statistics, scales of either sign and shifts."""
    return stirred(nn.BatchNorm2d(CHANNELS, **options))


def stirred(module: nn.Module) -> Any:
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                if part.running_mean is not None:
                    part.running_mean.normal_()
                    part.running_var.uniform_(0.2, 3)
                if part.affine:
                    part.weight.normal_()
                    part.bias.normal_()
    return module


class Net(nn.Module):
    """``forward(self, x)`` as a function of the parts, which are modules."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self.parts, x)


def images(dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    return torch.randn(batch, CHANNELS, 7, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)


def fusion(model: nn.Module) -> Fusion:
    found: list[Fusion] = []
    fuse(model, report=found.append)
    return found[0]


def layers(model: nn.Module) -> dict[str, FusedSPConv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedSPConv2d)}


def check(model: nn.Module, *folded: tuple[str, ...], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Fuse it, find ``folded`` in the layers in order, and compare with float64 and with the model as it was."""
    model = model.eval().to(dtype)
    x = images(dtype)
    state = copy.deepcopy(model.state_dict())
    found = fusion(model)
    assert tuple(fold.folded for fold in found.fused) == folded, str(found)
    fused = fuse(model)
    assert len(layers(fused)) == len(folded)
    with torch.no_grad():
        before = x.clone()
        got = fused(x)
        assert torch.equal(x, before), "the input was written to"
        assert_within_budget("y", got, model(x.clone()), copy.deepcopy(model).double()(x.double()))
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), f"{key} was written to"
    again = fuse(fused)
    assert fusion(fused).fused == ()
    with torch.no_grad():
        assert torch.equal(again(x), got)
    return fused


def kept(model: nn.Module, reason: str) -> None:
    """Nothing folds, for ``reason``, and results are the very same."""
    model = model.eval()
    found = fusion(model)
    assert found.fused == (), str(found)
    assert all(reason in fold.reason for fold in found.kept), str(found)
    fused = fuse(model)
    assert not layers(fused)
    x = images()
    with torch.no_grad():
        for got, expected in zip(as_tuple(fused(x)), as_tuple(model(x)), strict=True):
            assert torch.equal(got, expected)


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
