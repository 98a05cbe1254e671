"""Layers that infer on a CPU, and what they remember."""

from __future__ import annotations

import torch
from torch import Tensor

from spconv_triton import SPConv2d
from spconv_triton.native.convolution import MULTIPLIES_BFLOAT16
from spconv_triton.native.weights import PreparedWeights

DTYPES = (torch.float32, torch.bfloat16) if MULTIPLIES_BFLOAT16 else (torch.float32,)


def make(channels: int = 8, *, bias: bool = True) -> tuple[SPConv2d, Tensor]:
    return SPConv2d(channels, channels, 3, padding=1, bias=bias, backend="native").eval(), torch.randn(
        2, channels, 6, 5
    )


def prepared(layer: torch.nn.Module) -> PreparedWeights | None:
    kept = layer._inference._kept
    return None if kept is None else kept.weights


@torch.no_grad()
def infer(layer: SPConv2d, x: Tensor, times: int = 3) -> Tensor:
    for _ in range(times):
        y = layer(x)
    return y


def make_normed() -> tuple[SPConv2d, Tensor]:
    layer = SPConv2d(8, 8, 3, padding=1, branch_norm=True, backend="native")
    for norm in (layer.norm_representative, layer.norm_redundant):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            torch.nn.init.normal_(tensor)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    return layer.eval(), torch.randn(2, 8, 6, 5)
