"""What a layer says it would run is what it runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import RESNET50

from spconv_triton import SPConv2d, dispatch, explain
from spconv_triton.dispatch import INTERPRETED
from spconv_triton.native import products
from spconv_triton.native.weights import AVAILABLE

needs_triton = pytest.mark.skipif(
    not dispatch.HAS_TRITON or INTERPRETED or not torch.backends.cuda.is_built(),
    reason="traces for a GPU: needs triton and a torch built for CUDA, and runs natively",
)


def names(explanation: object) -> list[str]:
    return [launch.name.rpartition("::")[2] for launch in explanation.launches]


@needs_triton
@pytest.mark.parametrize("case", RESNET50, ids=str)
@pytest.mark.parametrize(
    ("capability", "path", "kernel"),
    [((9, 0), "descriptor", "onepass_descriptor"), ((8, 0), "flat", "onepass_forward")],
)
def test_resnet50_on_a_gpu(case, capability: tuple[int, int], path: str, kernel: str, capsys) -> None:
    layer = SPConv2d(case.in_channels, case.out_channels, 3, padding=1, bias=False, dtype=torch.float16)
    x = torch.empty(case.batch, case.in_channels, *case.size, dtype=torch.float16, device="meta")
    x = x.to(memory_format=torch.channels_last)
    found = explain(layer, x, capability=capability)
    assert (found.path.backend, found.path.name) == ("triton", path)
    assert names(found) == ["window_statistics", "gate_planes", kernel]
    assert all(launch.tiles and launch.bytes > 0 for launch in found.launches)
    assert found.input_bytes < found.kept_bytes <= found.input_bytes * (1.05 if case.size[0] >= 14 else 1.25)
    assert str(found) == capsys.readouterr().out.strip("\n")


@needs_triton
def test_branch_norms_on_a_gpu() -> None:
    layer = SPConv2d(32, 32, 3, padding=1, branch_norm=True)
    found = explain(layer, torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last), capability=(8, 0))
    assert found.path.name == "batch norm"
    ours = [launch.name for launch in found.launches if launch.tiles]
    assert ours == ["branches_forward", "sample_moments", "norm_gate", "norm_blend"]
    gate, statistics = 2 * 32 * 4, 3 * 2 * 32 * 4
    assert found.kept_bytes == 3 * found.input_bytes + gate + statistics  # x, U3 and U1


@needs_triton
def test_other_norms_on_a_gpu() -> None:
    layer = SPConv2d(32, 32, 3, padding=1, branch_norm=True)
    layer.norm_redundant = torch.nn.GroupNorm(4, 32)
    found = explain(layer, torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last), capability=(8, 0))
    assert found.path.name == "branch"
    ours = [launch.name for launch in found.launches if launch.tiles]
    assert ours == ["branch_forward", "fusion_statistics", "fusion_blend"]
    assert found.kept_bytes > 4 * found.input_bytes  # x, U3 and U1, and what the norms made of them


@pytest.mark.skipif(not AVAILABLE, reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize(
    ("channels", "options", "path"),
    [
        (32, {"padding": 1}, "merged weights"),
        (64, {"padding": 1}, "folded weights"),
        (64, {"padding": 1, "stride": 2}, "folded weights"),
        (64, {"padding": 1, "alpha": 1.0}, "folded weights"),
        (64, {"padding": 1, "groups": 4}, "prepared weights"),
        (64, {"padding": 2, "stride": 2}, "prepared weights"),
        (64, {}, "folded weights"),
        (64, {"padding": 1, "groups": 4, "padding_mode": "reflect"}, "prepared weights"),
        (64, {"padding": 1, "dtype": torch.float64}, "gate first"),
        (256, {"padding": 1, "dtype": torch.float64}, "given weights"),
    ],
    ids=str,
)
def test_cpu(channels: int, options: dict, path: str) -> None:
    x = torch.randn(8, channels, 14, 14, dtype=options.get("dtype")).to(memory_format=torch.channels_last)
    found = explain(SPConv2d(channels, channels, 3, **options), x)
    assert (found.path.backend, found.path.name) == ("native", path)
    assert names(found)
    copies = 2 if "padding_mode" in options else 1  # autograd keeps what is padded, and what it becomes
    assert copies * found.input_bytes <= found.kept_bytes <= 1.25 * copies * found.input_bytes


@needs_triton
def test_without_redundant_channels_on_a_gpu() -> None:
    layer = SPConv2d(32, 32, 3, padding=1, alpha=1.0)
    found = explain(layer, torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last), capability=(9, 0))
    assert found.path.name == "branch"
    assert found.kept_bytes == found.input_bytes


@pytest.mark.skipif(not AVAILABLE, reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize(
    ("size", "wider", "path"),
    [(56, False, "gate first"), (56, True, "folded weights"), (28, False, "folded weights")],
)
def test_large_maps_on_a_cpu(size: int, wider: bool, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where oneDNN multiplies wider than ATen, weights for each sample are not worth it."""
    monkeypatch.setattr(products, "ONEDNN_IS_WIDER", wider)
    monkeypatch.setattr(products, "LARGE_PRODUCT", 10e6)
    x = torch.randn(8, 64, size, size).to(memory_format=torch.channels_last)
    assert explain(SPConv2d(64, 64, 3, padding=1), x).path.name == path


def test_autocast_on_a_cpu() -> None:
    """What is explained is the dtype that is computed in."""
    x = torch.randn(2, 64, 6, 6).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.float16):
        assert explain(SPConv2d(64, 64, 3, padding=1), x).path.name == "given weights"
        normed = explain(SPConv2d(64, 64, 3, padding=1, branch_norm=True), x)
    assert normed.path.name == "given weights"
    assert any("batch_norm" in launch.name for launch in normed.launches), "the layer takes its norms part by part"


def test_a_meta_tensor() -> None:
    assert "meta" in explain(SPConv2d(8, 8, 3, device="meta"), torch.randn(1, 8, 5, 5, device="meta")).input


def test_norms_in_training_on_a_cpu() -> None:
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    found = explain(SPConv2d(8, 8, 3, padding=1, branch_norm=True), x)
    assert found.path.name == "batch norm"
    assert any("conv" in launch.name for launch in found.launches)
    half = explain(SPConv2d(8, 8, 3, padding=1, branch_norm=True).bfloat16(), x.bfloat16())
    assert half.path.name == "given weights"
    assert any("conv" in launch.name for launch in half.launches)


def test_no_row_of_paths_hides_behind_another() -> None:
    """Of a backend the first row that matches is taken, so the one that takes any layer comes last."""
    for backend in dispatch.BACKENDS[1:]:
        rows = [path for path in dispatch.PATHS if path.backend == backend]
        assert len({path.name for path in rows}) == len(rows)
        assert [path.layers == "any" for path in rows] == [*(False for _ in rows[1:]), True], backend


@pytest.mark.parametrize("capability", [9, (9,), "9.0", (9, 0.0), (-1, 0)], ids=str)
def test_capability_is_a_pair(capability: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="capability must be"):
        explain(SPConv2d(8, 8, 3), torch.randn(1, 8, 5, 5), capability=capability)


def test_statistics_of_norms_stay() -> None:
    layer = SPConv2d(8, 8, 3, branch_norm=True)
    before = copy.deepcopy(layer.state_dict())
    explain(layer, torch.randn(2, 8, 5, 5))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_reference() -> None:
    found = explain(SPConv2d(8, 8, 3, backend="reference"), torch.randn(1, 8, 5, 5))
    assert found.path.name == "reference"


def test_what_it_refuses() -> None:
    with pytest.raises(TypeError, match="module must be an SPConv2d, got Conv2d"):
        explain(torch.nn.Conv2d(8, 8, 3), torch.randn(1, 8, 5, 5))
    with pytest.raises(ValueError, match="x must have 8 channels"):
        explain(SPConv2d(8, 8, 3), torch.randn(1, 7, 5, 5))


def test_a_gpu_that_cannot_be_traced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(ValueError, match=r"capability must be None here.*got \(9, 0\)"):
        explain(SPConv2d(8, 8, 3), torch.randn(1, 8, 5, 5), capability=(9, 0))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_what_is_kept_is_that_of_training(context: Any) -> None:
    layer = SPConv2d(8, 8, 3)
    expected = explain(layer, torch.randn(2, 8, 5, 5)).kept_bytes
    with context():
        assert explain(layer, torch.randn(2, 8, 5, 5)).kept_bytes == expected > 0


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="nothing can be traced for a GPU")
@pytest.mark.parametrize("branch_norm", [False, True])
def test_aten_on_a_gpu(branch_norm: bool) -> None:
    layer = SPConv2d(8, 8, 3, backend="native", branch_norm=branch_norm)
    assert explain(layer, torch.randn(2, 8, 5, 5), capability=(9, 0)).path.name == "given weights"
