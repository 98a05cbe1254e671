"""The formulas of ``benchmarks.traffic`` against Triton's interpreter, which counts every byte and every product."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from cases import Case, make_inputs
from memory_guard import guarded
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from triton.runtime import interpreter

from benchmarks import traffic
from spconv_triton import launch
from spconv_triton.dispatch import INTERPRETED
from spconv_triton.kernels import tuning
from spconv_triton.launch import descriptor, gradients_descriptor
from spconv_triton.launch.descriptor import Tile
from spconv_triton.launch.gradients_descriptor import InputTile

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="bytes are counted in Triton's interpreter")

# Small, and each with something left over: blocks of channels, groups and pixels, windows, phases, samples.
BLOCKS = Case("blocks", 2, 54, 34, (5, 14), kernel_size=(1, 3), padding=(0, 1), alpha=0.63)
SAMPLES = Case("samples", 18, 10, 6, (1, 1), kernel_size=(1, 1), padding=(0, 0), alpha=0.6)
TINY = Case("tiny", 1, 10, 6, (4, 3), alpha=0.6)
CASES = (
    BLOCKS,
    TINY,
    Case("one-group", 2, 20, 12, (5, 5), groups=1),
    Case("stride-2", 2, 6, 4, (7, 9), stride=(2, 2), alpha=0.67),
    Case("shifted", 1, 8, 8, (10, 8), stride=(3, 2), padding=(0, 2)),
    Case("wide-padding", 1, 8, 8, (3, 4), padding=(3, 2)),
    Case("dilated-strides", 1, 8, 8, (9, 8), stride=(2, 4), padding=(2, 1), dilation=(2, 2)),
    Case("alpha-1", 2, 8, 8, (6, 5), alpha=1.0),
)

WIDE = Case("wide", 2, 64, 64, (5, 6), groups=1)
DESCRIPTOR_FORWARD = (
    (Tile(1, 8, 8, 64, 32, 4, 4), WIDE),
    (Tile(4, 4, 4, 64, 16, 4, 4), Case("two-groups", 3, 64, 128, (3, 5))),
    (Tile(16, 2, 2, 64, 16, 4, 4), Case("merged", 3, 64, 64, (5, 2), alpha=1 / 4)),
    (Tile(4, 2, 2, 64, 32, 4, 4), replace(WIDE, batch=5, size=(1, 1))),
    (Tile(1, 8, 8, 64, 32, 4, 4), replace(WIDE, size=(6, 18), stride=(2, 2))),
    (Tile(16, 2, 2, 64, 16, 4, 4), replace(WIDE, size=(2, 6), groups=2, stride=(2, 2))),
)
DESCRIPTOR_BACKWARD = (
    (InputTile(True, 1, 4, 64, 64, 64, 4, 3), Case("mixed", 2, 64, 64, (5, 62), alpha=1 / 4)),
    (InputTile(False, 2, 8, 8, 32, 64, 4, 3), Case("mixed-apart", 3, 64, 64, (9, 3))),
    (InputTile(True, 1, 8, 16, 64, 64, 4, 3), Case("one-group", 2, 128, 64, (9, 17), groups=1)),
    (InputTile(False, 16, 2, 4, 16, 64, 4, 3), Case("four-groups", 2, 64, 128, (5, 3), groups=4)),
    (InputTile(False, 4, 1, 1, 16, 64, 4, 3), Case("single-pixels", 5, 48, 64, (2, 1), alpha=1 / 3)),
    (InputTile(False, 16, 1, 1, 32, 64, 4, 3), Case("one-pixel", 2, 64, 64, (1, 1))),
    (InputTile(True, 1, 4, 64, 64, 64, 4, 3), Case("mixed-2", 2, 64, 64, (10, 124), alpha=1 / 4, stride=(2, 2))),
    (InputTile(False, 2, 8, 8, 32, 64, 4, 3), Case("mixed-apart-2", 3, 64, 64, (18, 6), stride=(2, 2))),
    (InputTile(True, 1, 8, 16, 64, 64, 4, 3), Case("one-group-2", 2, 128, 64, (18, 34), groups=1, stride=(2, 2))),
    (InputTile(False, 16, 2, 4, 16, 64, 4, 3), Case("four-groups-2", 2, 64, 128, (10, 6), groups=4, stride=(2, 2))),
    (InputTile(False, 4, 1, 1, 16, 64, 4, 3), Case("single-2", 5, 48, 64, (4, 2), alpha=1 / 3, stride=(2, 2))),
    (InputTile(False, 16, 1, 1, 32, 64, 4, 3), Case("one-pixel-2", 2, 64, 64, (2, 2), stride=(2, 2))),
)

SLOTS = ("branches_forward.mean_ptr", "branches_forward.square_ptr")
"""Slots for as many parts as a sample may have in blocks of pixels; most have one less."""

TABLES = {
    "branch_forward": tuning.FORWARD,
    "onepass_forward": tuning.FORWARD,
    "gate_planes": tuning.GATE,
    "input_grad": tuning.INPUT_GRAD,
    "weight_grad": tuning.WEIGHT_GRAD,
    "fusion_statistics": tuning.FUSION,
    "fusion_blend": tuning.FUSION,
    "fusion_blend_grad": tuning.FUSION_GRAD,
    "branches_forward": tuning.BRANCHES,
    "norm_blend": tuning.FUSION,
    "norm_sums": tuning.NORM_SUMS,
    "norm_blend_grad": tuning.FUSION,
}


@dataclass
class Counted:
    """What the interpreter saw of a launch: its arguments, and its products, two operations a multiply-add."""

    kernel: str
    values: dict[str, Any]
    flops: int = 0


@contextlib.contextmanager
def counting_products() -> Iterator[list[Counted]]:
    found: list[Counted] = []
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    init, dot = executor._init_args_hst, builder.create_dot

    def note(self: Any, args: Any, kwargs: Any) -> Any:
        found.append(Counted(self.fn.__name__, inspect.getcallargs(self.fn, *args, **kwargs)))
        return init(self, args, kwargs)

    def multiply(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        found[-1].flops += 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest)

    with mock.patch.object(executor, "_init_args_hst", note), mock.patch.object(builder, "create_dot", multiply):
        yield found


def check(call: Callable[[], object], *kernels: str) -> None:
    """Every count of every launch in ``call`` is what its formula says; the launches are of ``kernels``."""
    with (
        torch.no_grad(),
        set_wrap_triton_enabled(False),
        counting_products() as counted,
        guarded(partly_stored=SLOTS) as report,
    ):
        call()
    assert [one.kernel for one in counted] == [seen.kernel for seen in report.launches] == list(kernels)
    for noted, seen in zip(counted, report.launches, strict=True):
        expected = traffic.of_values(noted.kernel, noted.values, seen.grid)
        loaded = {name: (seen.unique_loaded_bytes[name], n) for name, n in seen.loaded_bytes.items() if n}
        stored = {name: (n, n) for name, n in seen.stored_bytes.items() if n}
        assert loaded == expected.loads, f"{noted.kernel} loads"
        assert stored == expected.stores, f"{noted.kernel} stores"
        assert noted.flops == sum(expected.flops.values()), f"{noted.kernel} multiplies"


def forward(
    case: Case,
    device: str,
    *kernels: str,
    path: str = "flat",
    dtype: torch.dtype = torch.float16,
    biases: bool = False,
    **options: Any,
) -> None:
    i = make_inputs(case, dtype, device=device, bias=biases, branch_bias=biases)
    if i.weight_redundant is None:
        check(lambda: launch.representative_branch(i.x, i.weight_gwc, i.weight_pwc, case.geometry), "branch_forward")
        return
    arguments = (*i.positional(), i.branch_bias, case.geometry)
    before = ("window_statistics", "gate_planes")
    check(lambda: launch.spconv2d(*arguments, path=path, **options), *before, *(kernels or ("onepass_forward",)))


def pooling(case: Case) -> tuple[str, ...]:
    """What averages windows before the weight gradient: nothing at stride 1."""
    return () if case.stride == (1, 1) else ("pool_windows",)


def backward(
    case: Case, device: str, path: str = "flat", dtype: torch.dtype = torch.float16, *, branch_bias: bool = False
) -> None:
    i = make_inputs(case, dtype, device=device, bias=False, branch_bias=branch_bias)
    grad = torch.randn(case.batch, case.out_channels, *case.output_size(), device=device).to(dtype)
    if i.weight_redundant is None:
        weights = (i.weight_gwc, i.weight_pwc, case.geometry)
        kernels = ("input_grad", *pooling(case), "weight_grad", "finish_weights")
        check(lambda: launch.representative_branch_backward(grad, i.x, *weights), *kernels)
        return
    ratio = torch.rand(case.batch, case.out_channels, device=device)
    tap_mean = i.x.new_zeros(case.batch, case.geometry.taps, case.representative)
    kept = (ratio, tap_mean, i.x.new_zeros(case.batch, case.in_channels), case.geometry)
    weights = (i.weight_gwc, i.weight_pwc, i.weight_redundant, i.branch_bias)
    suffix = "_descriptor" if path == "descriptor" else ""
    kernels = (*pooling(case), f"weight_grad{suffix}", "gate_grad", "finish_weights", f"input_grad{suffix}")
    check(lambda: launch.spconv2d_backward(grad, i.x, *weights, *kept, path=path), *kernels)


def tune(monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    """Every tuned kernel runs with this row of its table, or the last; elsewhere it is always the last."""
    for kernel in launch.TUNED_KERNELS:
        table = TABLES[kernel.base_fn.__name__]
        monkeypatch.setattr(kernel, "configs", [table[min(row, len(table) - 1)]])


@pytest.mark.parametrize("few", [launch.layer.FEW, 0], ids=["few", "blocks"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case, few: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.layer, "FEW", few)
    forward(case, device)


@pytest.mark.parametrize("case", [replace(BLOCKS, batch=1), *CASES[1:]], ids=str)
def test_backward(case: Case, device: str) -> None:
    backward(case, device)


@pytest.mark.parametrize("row", range(max(map(len, TABLES.values()))))
def test_every_configuration(row: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(monkeypatch, row)
    forward(BLOCKS, device)
    monkeypatch.setattr(launch.layer, "FEW", 0)
    forward(BLOCKS, device)
    backward(TINY, device)


def test_biases_epilogue_and_float32(device: str) -> None:
    residual = torch.randn(SAMPLES.batch, SAMPLES.out_channels, 1, 1, device=device)
    added = {"residual": residual, "norm_scale": torch.rand(SAMPLES.out_channels, device=device)}
    forward(SAMPLES, device, dtype=torch.float32, biases=True, activation="relu", **added)
    backward(SAMPLES, device, dtype=torch.float32, branch_bias=True)


@pytest.mark.parametrize(("tile", "case"), DESCRIPTOR_FORWARD, ids=str)
def test_descriptor_forward(tile: Tile, case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptor, "best_tile", lambda *args: tile)
    residual = torch.randn(case.batch, case.out_channels, *case.output_size(), device=device).half()
    added = {"residual": residual} if tile.block_n == 4 else {}
    forward(case, device, "onepass_descriptor", path="descriptor", **added)


@pytest.mark.parametrize(("tile", "case"), DESCRIPTOR_BACKWARD, ids=str)
def test_descriptor_backward(tile: InputTile, case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients_descriptor, "input_tile", lambda *args: tile)
    backward(case, device, "descriptor")


@pytest.mark.parametrize("sides", [(2, 21, 6, 5), (1, 18, 40, 17)], ids=str)
def test_fusion(sides: tuple[int, ...], device: str) -> None:
    def branch() -> Tensor:
        return torch.randn(sides, device=device).half().contiguous(memory_format=torch.channels_last)

    u3, u1, grad, gate = branch(), branch(), branch(), torch.zeros(sides[:2], device=device)
    check(lambda: launch.gap_softmax_fusion(u3, u1), "fusion_statistics", "fusion_blend")
    kernels = ("fusion_statistics", "fusion_blend_grad")
    check(lambda: launch.gap_softmax_fusion_backward(grad, u3, u1, gate), *kernels)


@pytest.mark.parametrize("case", [BLOCKS, replace(CASES[3], padding=(0, 0)), replace(SAMPLES, batch=5)], ids=str)
def test_batch_norms(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch.branch_norm.COEFFICIENT_BLOCKS, "BLOCK_N", 4)
    i = make_inputs(case, torch.float16, device=device)
    weights, eps = (i.weight_gwc, i.weight_pwc, i.weight_redundant), (1e-5, 1e-5)
    norms = launch.Norms(*(torch.rand(case.out_channels, device=device) for _ in range(4)))
    grad = torch.randn(case.batch, case.out_channels, *case.output_size(), device=device).half()
    kept: list[launch.Kept] = []
    kernels = ("branches_forward", "sample_moments", "norm_gate", "norm_blend")
    check(
        lambda: kept.append(launch.spconv2d_batch_norm(i.x, *weights, i.bias, norms, eps, case.geometry)[1]), *kernels
    )
    kernels = ("norm_sums", "norm_coefficients", "norm_blend_grad", *pooling(case), "weight_grad", "finish_weights")
    kernels += ("input_grad",)
    check(lambda: launch.spconv2d_batch_norm_backward(grad, i.x, *weights, norms, kept[0], case.geometry), *kernels)


def test_a_kernel_that_has_changed_is_noticed(device: str) -> None:
    """One program more, or a tensor that no formula knows, and the counts are refused instead of being wrong."""
    u3 = torch.zeros(1, 16, 2, 2, device=device)
    partial = torch.zeros(1, 1, 16, device=device)
    values = {"u3_ptr": u3, "u1_ptr": u3, "grad_ptr": u3, "partial_ptr": partial, "N": 1, "P": 4, "C": 16}
    values |= {"WEIGHTED": False, "BLOCK_PIX": 64, "BLOCK_C": 16}
    assert traffic.of_values("fusion_statistics", values, (1, 1)).touched == (2 * 64 + 16) * 4
    with pytest.raises(ValueError, match="launched with 2 programs, and its formula expects 1"):
        traffic.of_values("fusion_statistics", values, (1, 2))
    with pytest.raises(ValueError, match="does not know: mask_ptr"):
        traffic.of_values("fusion_statistics", {**values, "mask_ptr": u3}, (1, 1))
    with pytest.raises(ValueError, match="no formula counts what 'winograd' loads"):
        traffic.of_values("winograd", values, (1, 1))
