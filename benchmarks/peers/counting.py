"""Parameters and multiply-accumulates of networks in which a peer stands."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from benchmarks.peers.layers import HetConv
from spconv_triton.network_summary import summarize


def count_parameters(network: nn.Module, *, norms: bool = True) -> int:
    """Learnable numbers; ``norms=False`` leaves those of batch norms out, as some papers do."""
    left_out = () if norms else (nn.BatchNorm2d,)
    modules = (m for m in network.modules() if not isinstance(m, left_out))
    return sum(p.numel() for m in modules for p in m.parameters(recurse=False))


def count_macs(network: nn.Module, x: Any) -> int:
    """Of the equations, for one forward pass: convolutions and linear layers; HetConv's zeros multiply nothing.

    Args:
        x: the input's shape, or the input.
    """
    zeros = 0

    def count(module: HetConv, _inputs: Any, y: Tensor) -> None:
        nonlocal zeros
        zeros += module.zeros * y.numel() // y.shape[1]

    handles = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, HetConv)]
    try:
        return summarize(network, x).total.macs_after - zeros
    finally:
        for handle in handles:
            handle.remove()
