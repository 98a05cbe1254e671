"""The convolution kernels with what may follow the layer in inference, compiled for GPUs that are not here."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from spconv_triton.dispatch import HAS_TRITON, INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs compiled kernels: runs natively", allow_module_level=True)

from cases import RESNET50, Case
from lowering import inductor_sources
from test_lowering import launches

from benchmarks.competitors import with_batch
from benchmarks.launches import CAPABILITIES, Launch, compile_launch, forward_launches
from benchmarks.machine_code import read
from spconv_triton.functional import spconv2d_inference

TARGETS = ("sm_80", "sm_90", "sm_100")
CONVOLUTION = -1  # of the three launches


def launched(
    case: Case, dtype: torch.dtype, capability: tuple[int, int] | None, activation: str, *, residual: bool
) -> list[Launch]:
    """The three launches of a layer at batch 32 with a norm, an activation and maybe a residual behind it."""
    norm_scale = torch.empty(case.out_channels, device="meta")
    after: dict[str, Any] = {"norm_scale": norm_scale, "activation": activation, "residual": residual}
    return forward_launches(with_batch(case, 32), dtype, capability, bias=True, branch_bias=True, **after)


def assert_nothing_spills(found: Launch, target: str) -> None:
    """In the first configuration, whose tile is the largest."""
    used = read(compile_launch(found, target, found.configs[0]))
    assert used.spilled_bytes == 0, f"{found.name} spills {used.spilled_bytes} bytes a thread on {target}"


@pytest.mark.parametrize(
    ("target", "dtype", "activation", "residual"),
    [
        ("sm_80", torch.bfloat16, "silu", True),
        ("sm_80", torch.float32, "relu6", True),
        ("sm_90", torch.float32, "silu", True),
        ("sm_100", torch.bfloat16, "relu6", True),
    ],
    ids=str,
)
def test_flat(target: str, dtype: torch.dtype, activation: str, residual: bool) -> None:
    found = launched(RESNET50[2], dtype, CAPABILITIES["sm_80"], activation, residual=residual)
    assert [launch.name for launch in found] == ["window_statistics", "gate_planes", "onepass_forward"]
    assert_nothing_spills(found[CONVOLUTION], target)


@pytest.mark.parametrize(("activation", "residual"), [("silu", True), ("relu6", False)])
@pytest.mark.drawn(4, ("target", "case"), itertools.product(("sm_90", "sm_100"), RESNET50), ids=str)
def test_descriptor(target: str, case: Case, activation: str, residual: bool) -> None:
    found = launched(case, torch.float16, CAPABILITIES[target], activation, residual=residual)[CONVOLUTION]
    assert found.name == "onepass_descriptor"
    assert_nothing_spills(found, target)


@pytest.mark.parametrize("target", TARGETS)
def test_gate(target: str) -> None:
    found = launched(RESNET50[2], torch.float16, CAPABILITIES[target], "relu", residual=False)[1]
    assert found.constants["NORM_SCALE"]
    assert_nothing_spills(found, target)


@pytest.mark.filterwarnings("ignore")  # Inductor's own
@pytest.mark.parametrize("residual", [False, True])
def test_compiled_layer_is_three_launches_and_nothing_else(residual: bool) -> None:
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    gwc = torch.randn(32, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    weights = gwc, torch.randn(32, 16, 1, 1), torch.randn(32, 16, 1, 1), torch.rand(32)
    after: dict[str, Any] = {"norm_scale": torch.rand(32), "activation": "silu"}
    if residual:
        after["residual"] = torch.randn_like(x)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return spconv2d_inference(x, *weights, padding=1, backend="triton", **after)

    with torch.no_grad():
        (source,) = inductor_sources(layer, x)
    assert launches(source) == ["window_statistics", "gate_planes", "onepass_forward"]
    assert "torch.ops.spconv_triton" not in source
    assert "extern_kernels." not in source
    assert "cpp_fused" not in source, "something besides the three launches"
