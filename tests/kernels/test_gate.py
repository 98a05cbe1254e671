"""The planes of the gate and the means that the backward keeps, of few samples and of blocks of samples."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import GATED, Case, Inputs, assert_within_budget, make_inputs
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled

from spconv_triton import functional, launch, reference
from spconv_triton.launch import layer

pytestmark = pytest.mark.usefixtures("poisoned_empty")

WIDE = Case("wide", 2, 64, 128, (8, 8))
LONG = Case("long", 2, 96, 44, (6, 5), kernel_size=(5, 5), padding=(2, 2), alpha=0.5)
WAYS = pytest.mark.parametrize("few", [layer.FEW, 0], ids=["few", "blocks"])


def gate(inputs: Inputs, case: Case, path: str = "flat") -> tuple[Tensor, Tensor, Tensor]:
    """What a layer leaves for its backward: gamma / beta, and the means of taps and of pooled pixels."""
    tensors = (inputs.x, inputs.weight_gwc, inputs.weight_pwc, inputs.weight_redundant, inputs.bias, inputs.branch_bias)
    with torch.no_grad(), set_wrap_triton_enabled(False):
        return launch.spconv2d(*tensors, case.geometry, path=path)[1:]


def expected_beta(inputs: Inputs, case: Case) -> Tensor:
    """beta by the paper's equations, in the dtype of the inputs, with a softmax in float32 or better."""
    x3, x1 = inputs.x.detach().split((case.representative, case.in_channels - case.representative), dim=1)
    u3 = reference.representative_branch(x3, inputs.weight_gwc, inputs.weight_pwc, **case.window)
    window = {name: case.window[name] for name in ("stride", "padding", "dilation")}
    u1 = functional.redundant_branch(x1, inputs.weight_redundant, kernel_size=case.kernel_size, **window)
    precise = torch.promote_types(u3.dtype, torch.float32)
    s3, s1 = (u.detach().to(precise).mean((2, 3)) for u in (u3, u1))
    if inputs.branch_bias is not None:
        b3, b1 = inputs.branch_bias.detach().to(precise)
        s3, s1 = s3 + b3, s1 + b1
    return torch.softmax(torch.stack((s3, s1)), 0)[0]


def check(inputs: Inputs, case: Case, path: str = "flat") -> tuple[Tensor, Tensor]:
    ratio, *means = gate(inputs, case, path)
    exact = expected_beta(inputs.to(torch.float64), case)
    assert_within_budget("beta", 1 / (1 + ratio), expected_beta(inputs, case), exact)
    return means[0], means[1]


@WAYS
@pytest.mark.parametrize("case", [*GATED, LONG, WIDE], ids=str)
def test_agrees_with_float64(case: Case, few: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "FEW", few)
    check(make_inputs(case, device=device, branch_bias=True), case)


@WAYS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", ["flat", "descriptor"])
def test_half_precision(path: str, dtype: torch.dtype, few: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "FEW", few)
    check(make_inputs(WIDE, dtype, device=device), WIDE, path)


@pytest.mark.parametrize("batch", [layer.FEW, layer.FEW + 1, 3 * layer.FEW])
def test_every_sample_has_its_gate(batch: int, device: str) -> None:
    case = replace(GATED[2], batch=batch)
    check(make_inputs(case, device=device, mean=1.0), case)


def test_long_weights_are_not_held(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "LONGEST", LONG.in_channels)
    check(make_inputs(LONG, device=device), LONG)


@pytest.mark.parametrize("case", [*GATED[:4], LONG, replace(WIDE, stride=(2, 2))], ids=str)
def test_means_are_the_same_bits_either_way(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(case, torch.float16, device=device)
    of_few = check(inputs, case)
    monkeypatch.setattr(layer, "FEW", 0)
    for got, expected in zip(of_few, check(inputs, case), strict=True):
        assert torch.equal(got, expected)


@WAYS
@pytest.mark.parametrize("sign", [1, -1])
def test_saturates_and_stays_finite(sign: int, few: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "FEW", few)
    inputs = make_inputs(GATED[0], device=device, gate=sign * 500.0)
    ratio = gate(inputs, GATED[0])[0].double()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.0 if sign > 0 else math.exp(60)), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, of the interpreter
@WAYS
def test_infinite_means_are_nan(few: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the sample that has them, in every channel that they reach; other samples are as they were."""
    monkeypatch.setattr(layer, "FEW", few)
    inputs = make_inputs(GATED[0], device=device)
    with torch.no_grad():
        inputs.x[1, -1] = float("inf")
    ratio = gate(inputs, GATED[0])[0]
    assert ratio[1].isnan().all()
    assert ratio[0].isfinite().all()
