"""A compiled layer, lowered for a GPU that is not there, launches our kernels and nothing opaque."""

from __future__ import annotations

import re

import pytest
import torch
from lowering import inductor_sources

from spconv_triton import SPConv2d
from spconv_triton.dispatch import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels: runs natively"),
    pytest.mark.filterwarnings("ignore"),  # Inductor's own
]


def launches(source: str) -> list[str]:
    """The Triton kernels that the generated code launches, in order, without the number that makes a name unique."""
    return [re.sub(r"_\d+$", "", name) for name in re.findall(r"^\s*(\w+)\.run\(", source, re.M)]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_layer_launches_our_kernels(target: str) -> None:
    layer = torch.nn.Sequential(SPConv2d(32, 32, 3, padding=1, backend="triton"), torch.nn.ReLU())
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    forward, backward = inductor_sources(layer, x, target=target)
    assert launches(forward) == ["window_statistics", "gate_planes", "onepass_forward"]
    assert launches(backward) == ["weight_grad", "gate_grad", "finish_weights", "input_grad"]
    assert "torch.ops.spconv_triton" not in forward + backward


def test_branches_and_fusion_launch_our_kernels() -> None:
    layer = SPConv2d(32, 32, 3, padding=1, branch_norm=True, backend="triton").to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    forward, backward = inductor_sources(layer, x)
    assert launches(forward) == ["branch_forward", "fusion_statistics", "fusion_blend"]
    assert launches(backward) == ["fusion_statistics", "fusion_blend_grad", "weight_grad", "finish_weights"]


def test_dynamic_batch_gives_a_symbolic_grid() -> None:
    layer = SPConv2d(32, 32, 3, padding=1, backend="triton")
    x = torch.randn(3, 32, 8, 9).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        (forward,) = inductor_sources(layer, x, dynamic=True)
    assert launches(forward) == ["window_statistics", "gate_planes", "onepass_forward"]
    assert re.search(r"onepass_forward\w*\.run\([^)]*\bs\d+", forward)
