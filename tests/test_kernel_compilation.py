"""Every kernel compiles for GPUs that this machine does not have, within their registers and shared memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spconv_triton.dispatch import HAS_TRITON, INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs compiled kernels: runs natively", allow_module_level=True)

from benchmarks.machine_code import compile_kernel, read
from spconv_triton.kernels import backward, branch, fusion, gate, onepass, statistics
from spconv_triton.kernels.tuning import weight_grad_channels

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def pointer(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(16, dtype=dtype, device="meta")


def launch(name: str, dtype: torch.dtype, stride: int = 1, channels: int = 256) -> Launch:
    """Kernel, arguments and constants as for a ResNet-50 layer at 14 x 14."""
    p, f, sizes = pointer(dtype), pointer(torch.float32), (14, 14, 14 // stride, 14 // stride)
    window = {"KH": 3, "KW": 3, "PAD_H": 1, "PAD_W": 1, "DILATION_H": 1, "DILATION_W": 1}
    window |= {"STRIDE_H": stride, "STRIDE_W": stride}
    layer = {"CR": channels // 2, "CO": channels, "G": 2, "PRECISION": "tf32", **window}
    if name == "branch_forward":
        return branch.branch_forward, (p, p, p, p, 1568, *sizes, channels), layer
    layer["C"] = channels
    if name == "onepass_forward":
        epilogue = {"RESIDUAL": True, "ACTIVATION": "silu"}
        return onepass.onepass_forward, (p, p, p, p, f, f, f, p, p, 1568, *sizes, channels), layer | epilogue
    if name == "input_grad":
        steps = {"TAP_STEP_H": stride, "TAP_STEP_W": stride, "GATED": True}
        return backward.input_grad, (p, p, p, p, f, f, p, 196 // stride**2, *sizes), layer | steps
    if name == "weight_grad":
        gated = {"GATED": True, "BLOCK_C": weight_grad_channels(channels // 4)}
        arguments = (p, p, p, p, p, f, f, f, 8, 2, 196, *sizes, channels, 1)
        return backward.weight_grad, arguments, layer | gated
    rows = 9 if stride == 1 else 11
    if name == "window_statistics":
        rows_of = {"C": channels, "ROWS": rows, "BLOCK_ROWS": 16}
        return statistics.window_statistics, (p, f, 8, *sizes, 98, channels), window | rows_of
    constants = {"C": channels, "CR": channels // 2, "CO": channels, "G": 2, "TAPS": 9, "ROWS": rows, "SPLITS": 2}
    constants |= {"POOL_ROW": 4 if stride == 1 else 9, "BIAS": True, "BRANCH_BIAS": True, "NORM_SCALE": True}
    constants |= {"PACK": True, "MERGE": 1, "STRIDE": stride}
    return gate.gate_planes, (f, p, p, p, p, f, f, f, f, f, p, p, p, 8, 196 // stride**2), constants


def chosen(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> list[Any]:
    """The configs that the tuner would time for this launch."""
    named = dict(zip(kernel.arg_names, args, strict=False))
    return kernel.early_config_prune(kernel.configs, named, **constants)


def assert_fits(kernel: Any, target: str, config: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    used = read(compile_kernel(kernel, target, config, *args, **constants))
    assert used.spilled_bytes == 0, f"{config} spills {used.spilled_bytes} bytes a thread on {target}"
    limit = SHARED_BYTES[target]
    assert used.shared_bytes <= limit, f"{config} takes {used.shared_bytes} of {limit} bytes of shared memory"


KERNELS = ("branch_forward", "onepass_forward", "input_grad", "weight_grad", "window_statistics", "gate_planes")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("target", "dtype"), [("sm_90", torch.bfloat16), ("sm_80", torch.float32)], ids=str)
def test_layer(target: str, dtype: torch.dtype, name: str, stride: int) -> None:
    kernel, args, constants = launch(name, dtype, stride)
    configs = chosen(kernel, args, constants)
    assert configs
    for config in configs[:2]:
        assert_fits(kernel, target, config, args, constants)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_fusion(target: str) -> None:
    half, single = pointer(torch.float16), pointer(torch.float32)
    for kernel, args, constants in (
        (fusion.fusion_statistics, (half, half, half, single, 8, 196, 98), {"C": 256, "WEIGHTED": True}),
        (fusion.fusion_blend, (half, half, single, half, single, 8, 196), {"C": 256, "SPLITS": 2}),
        (fusion.fusion_blend_grad, (half, single, single, half, half, 8, 196), {"C": 256, "SPLITS": 2}),
    ):
        assert_fits(kernel, target, kernel.configs[0], args, constants)


def test_tensor_cores_are_used() -> None:
    kernel, args, constants = launch("onepass_forward", torch.float16)
    compiled = compile_kernel(kernel, "sm_90", chosen(kernel, args, constants)[0], *args, **constants)
    assert read(compiled).count("HGMMA") > 0
