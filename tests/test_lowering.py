"""Compiled layers and a compiled network, lowered for a GPU that is not there, launch our kernels and nothing else."""

from __future__ import annotations

import re

import pytest
import torch
from lowering import calls, inductor_sources

from spconv_triton import SPConv2d, models
from spconv_triton.dispatch import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels: runs natively"),
    pytest.mark.filterwarnings("ignore"),  # Inductor's own
]

FORWARD = ["window_statistics", "gate_planes", "onepass_forward"]
BACKWARD = ["weight_grad", "gate_grad", "finish_weights", "input_grad"]

BATCH_NORM_FORWARD = ["branches_forward", "sample_moments", "norm_gate", "norm_blend"]
BATCH_NORM_BACKWARD = ["norm_sums", "norm_coefficients", "norm_blend_grad", *BACKWARD[:1], *BACKWARD[2:]]

STRIDED = 2
"""ResNet-8's layers at a stride, whose backward averages windows first."""

OTHER_CONVOLUTIONS = 3
"""ResNet-8's first convolution and its two shortcuts stay what they are."""

LAYERS = 6


def launches(source: str) -> list[str]:
    return [call.name for call in calls(source)]


def without_pooling(names: list[str], strided: int) -> list[str]:
    """The launches but those that layers at a stride have more of, which are so many."""
    assert names.count("pool_windows") == strided
    return [name for name in names if name != "pool_windows"]


def convolutions(source: str) -> int:
    """Of ATen, forward or backward, as the generated code calls them."""
    return len(re.findall(r"= (?:extern_kernels|torch\.ops\.aten)\.convolution\w*(?:\.default)?\(", source))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_layer_launches_our_kernels(target: str) -> None:
    layer = torch.nn.Sequential(SPConv2d(32, 32, 3, padding=1, backend="triton"), torch.nn.ReLU())
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    forward, backward = inductor_sources(layer, x, target=target)
    assert launches(forward) == FORWARD
    assert launches(backward) == BACKWARD
    assert "fused_empty" not in forward + backward, "a pass that fills what a kernel is about to write"


@pytest.mark.parametrize("stride", [1, 2])
def test_layer_over_descriptors_calls_our_operators(stride: int) -> None:
    """PyTorch loses a kernel that is given descriptors, so those are operators that it does not see into."""
    layer = SPConv2d(64, 64, 3, stride, padding=1, bias=False, backend="triton").half()
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 8, 8).half().contiguous(memory_format=torch.channels_last).requires_grad_()
    forward, backward = inductor_sources(layer, x, capability=(9, 0))
    assert launches(forward) == [*FORWARD[:2], "onepass_descriptor"]
    gradients = without_pooling(launches(backward), stride - 1)
    assert gradients == ["weight_grad_descriptor", *BACKWARD[1:3], "input_grad_descriptor"]
    assert "cpp_fused" not in forward + backward, "a copy or a fill besides"


def test_branches_and_fusion_launch_our_kernels() -> None:
    layer = SPConv2d(32, 32, 3, padding=1, branch_norm=True, backend="triton").to(memory_format=torch.channels_last)
    layer.norm_redundant = torch.nn.GroupNorm(4, 32)  # with batch norms alone the layer has kernels of its own
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    forward, backward = inductor_sources(layer, x)
    assert launches(forward) == ["branch_forward", "fusion_statistics", "fusion_blend"]
    assert launches(backward) == ["fusion_statistics", "fusion_blend_grad", "weight_grad", "finish_weights"]


def resnet8(*, branch_norm: bool) -> tuple[torch.nn.Module, torch.Tensor]:
    """ResNet-20 with one block of each width, where that has three alike."""
    options = models.SPConvOptions(0.5, 2, branch_norm, "triton")
    stem = torch.nn.Conv2d(3, 16, 3, padding=1, bias=False)
    network = models.ResNet(models.BasicBlock, (1, 1, 1), (16, 32, 64), stem, torch.nn.Identity(), 10, options)
    network.to(memory_format=torch.channels_last)
    assert sum(isinstance(module, SPConv2d) for module in network.modules()) == LAYERS
    return network, torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)


def test_dynamic_sizes_give_symbolic_grids() -> None:
    layer = SPConv2d(32, 32, 3, padding=1, backend="triton")
    x = torch.randn(3, 32, 8, 9).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        (forward,) = inductor_sources(layer, x, dynamic=True)
    assert launches(forward) == FORWARD
    assert all(call.symbolic for call in calls(forward))
    assert "'BLOCK_W': 64" in forward, "the block of a width that is no symbol: it has been asked"


def test_resnet8_launches_three_kernels_a_layer_forward_and_four_or_five_backward() -> None:
    """As one graph, for any batch."""
    network, x = resnet8(branch_norm=False)
    torch._dynamo.mark_dynamic(x, 0)
    forward, backward = inductor_sources(network, x, dynamic=None)
    assert launches(forward) == LAYERS * FORWARD
    assert without_pooling(launches(backward), STRIDED) == LAYERS * BACKWARD
    assert convolutions(forward) == convolutions(backward) == OTHER_CONVOLUTIONS
    assert "fused_empty" not in forward + backward
    for call in calls(forward) + calls(backward):
        # The other two go over weights; into how many slices, small batches decide by a guard.
        if call.name not in ("weight_grad", "finish_weights"):
            assert call.symbolic, call


def test_resnet8_with_branch_norms_launches_in_every_layer_what_one_alone_does() -> None:
    layer = SPConv2d(32, 32, 3, padding=1, bias=False, branch_norm=True, backend="triton")
    x = torch.randn(4, 32, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    alone = inductor_sources(layer.to(memory_format=torch.channels_last), x)
    assert launches(alone[0]) == BATCH_NORM_FORWARD
    assert launches(alone[1]) == BATCH_NORM_BACKWARD
    network, images = resnet8(branch_norm=True)
    for strided, one, whole in zip((0, STRIDED), alone, inductor_sources(network, images), strict=True):
        assert without_pooling(launches(whole), strided) == LAYERS * launches(one)
        assert convolutions(whole) == OTHER_CONVOLUTIONS + LAYERS * convolutions(one)


def test_branch_norms_fold_in_eval() -> None:
    layer = SPConv2d(32, 32, 3, padding=1, branch_norm=True, backend="triton").to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        (forward,) = inductor_sources(layer.eval(), x)
    assert launches(forward) == FORWARD
    assert convolutions(forward) == 0
