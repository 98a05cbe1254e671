"""ONNX through the layer's decomposition, checked against onnxruntime."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_within_budget
from small_network import small_network
from torch import Tensor, nn
from torch.export import Dim

from spconv_triton import SPConv2d, fuse

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = [pytest.mark.filterwarnings("ignore")]  # of what the exporter itself calls

BATCH = {0: Dim("batch")}
ANY = {0: Dim("batch"), 2: Dim("height", min=4), 3: Dim("width", min=4)}

MODULES: dict[str, tuple[Callable[[], nn.Module], dict[int, Any]]] = {
    "stride-1": (lambda: SPConv2d(8, 12, 3, padding=1), ANY),
    "stride-2": (lambda: SPConv2d(8, 12, 3, 2, 1), BATCH),
    "stride-2-any-size": (lambda: SPConv2d(8, 12, 3, 2, 1), ANY),
    "stride-3-circular": (lambda: SPConv2d(8, 12, 5, 3, 1, padding_mode="circular"), ANY),
    "branch-norm": (lambda: SPConv2d(8, 12, 3, 2, 1, branch_norm=True), BATCH),
    "network": (small_network, BATCH),
    "fused-network": (lambda: fuse(small_network(branch_norm=True).eval()), ANY),
}


@torch.no_grad()
def stirred(module: nn.Module) -> nn.Module:
    """In eval mode, its norms with statistics and factors."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.normal_()
            norm.bias.normal_()
    return module.eval()


@torch.no_grad()  # or a fused layer would refuse what requires gradients
@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_onnxruntime_agrees(name: str, tmp_path: Path) -> None:
    build, dynamic = MODULES[name]
    module = stirred(build())
    channels = 3 if "network" in name else 8
    file = tmp_path / "module.onnx"
    x = torch.randn(2, channels, 9, 8)
    torch.onnx.export(module, (x,), dynamo=True, dynamic_shapes=(dynamic,), verbose=False).save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    sizes = ((9, 8), (12, 11), (7, 14)) if dynamic is ANY else ((9, 8),)
    for batch, size in zip((1, 5, 3), sizes, strict=False):
        assert_runs_alike(session, given.name, module, torch.randn(batch, channels, *size))


def assert_runs_alike(session: Any, given: str, module: nn.Module, x: Tensor) -> None:
    (y,) = session.run(None, {given: x.numpy()})
    same_dtype, exact = module(x), as_double(module)(x.double())
    # onnxruntime sums in an order of its own, and folds norms into convolutions.
    assert_within_budget("y", torch.from_numpy(y), same_dtype, exact, condition=8.0)


def as_double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()
