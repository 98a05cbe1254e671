"""A compiled layer, lowered for a GPU that is not there, launches our kernels and nothing opaque."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
from lowering import inductor_sources

from spconv_triton import SPConv2d
from spconv_triton.dispatch import INTERPRETED
from spconv_triton.launch import descriptor, gradients_descriptor

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
    assert "fused_empty" not in forward + backward, "a pass that fills what a kernel is about to write"


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


def test_convolution_over_descriptors_is_called_after_its_weights_are_packed() -> None:
    layer = SPConv2d(64, 64, 3, padding=1, bias=False, backend="triton").half().to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 8, 8).half().contiguous(memory_format=torch.channels_last).requires_grad_()
    with mock.patch.object(descriptor, "capability", lambda device: (9, 0)):
        forward, backward = inductor_sources(layer, x)
    assert launches(forward) == ["window_statistics", "gate_planes"]
    called = forward.index("torch.ops.spconv_triton.onepass_descriptor")
    assert forward.rindex(".run(") < called
    assert "onepass_descriptor" not in backward
    assert "cpp_fused" not in forward, "a copy or a fill besides the three launches"


def test_backward_over_descriptors_is_four_launches() -> None:
    layer = SPConv2d(64, 64, 3, padding=1, bias=False, backend="triton").half().to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 8, 8).half().contiguous(memory_format=torch.channels_last).requires_grad_()
    with mock.patch.object(gradients_descriptor, "capability", lambda device: (9, 0)):
        _, backward = inductor_sources(layer, x)
    calls = re.findall(
        r"torch\.ops\.spconv_triton\.(\w+)\.default\(|^\s*(gate_grad|finish_weights)_\d+\.run\(", backward, re.M
    )
    names = [opaque or traced for opaque, traced in calls]
    assert names == ["weight_grad_descriptor", "gate_grad", "finish_weights", "input_grad_descriptor"]
    assert len(launches(backward)) == 2
    assert "cpp_fused" not in backward, "a copy or a fill besides the four launches"
