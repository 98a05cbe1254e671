"""The representative branch's kernels against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import BY_NAME, SMALL, Case, Inputs, assert_within_budget, make_inputs

from spconv_triton import functional, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def branch(inputs: Inputs, case: Case, backend: str, grad: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """U3, and with ``grad`` its gradients, on leaves of their own."""
    names = ("x3", "weight_gwc", "weight_pwc")
    values = (inputs.x[:, : case.representative], inputs.weight_gwc, inputs.weight_pwc)
    leaves = [value.detach().requires_grad_() for value in values]
    if backend == "reference":
        u3 = reference.representative_branch(*leaves, **case.window)
    else:
        u3 = functional.representative_branch(*leaves, **case.window, backend=backend)
    if grad is None:
        return {"u3": u3.detach()}
    grads = torch.autograd.grad(u3, leaves, grad.to(u3.dtype))
    return {"u3": u3.detach(), **dict(zip(names, grads, strict=True))}


def check(inputs: Inputs, case: Case) -> None:
    shape = branch(inputs, case, "reference")["u3"].shape
    grad = torch.randn(shape, device=inputs.x.device).to(inputs.x.dtype)
    got = branch(inputs, case, "triton", grad)
    same_dtype = branch(inputs, case, "reference", grad)
    exact = branch(inputs.to(torch.float64), case, "reference", grad)
    for name, value in exact.items():
        assert_within_budget(name, got[name], same_dtype[name], value)


@pytest.mark.drawn(38, ("case", "dtype"), itertools.product(SMALL, DTYPES), ids=str)
def test_agrees_with_float64(case: Case, dtype: torch.dtype, device: str) -> None:
    check(make_inputs(case, dtype, device=device), case)


@pytest.mark.parametrize("name", ["odd-channels", "stride-2-odd"])
def test_contiguous_input(name: str, device: str) -> None:
    case = BY_NAME[name]
    check(make_inputs(case, device=device, memory_format=torch.contiguous_format), case)


def test_large_mean(device: str) -> None:
    case = BY_NAME["odd-pixels"]
    check(make_inputs(case, torch.bfloat16, device=device, mean=100.0), case)


def test_output_is_channels_last(device: str) -> None:
    case = BY_NAME["stride-2"]
    u3 = branch(make_inputs(case, device=device), case, "triton")["u3"]
    assert u3.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["odd-channels", "stride-2"])
def test_same_input_same_bits(name: str, device: str) -> None:
    case = BY_NAME[name]
    inputs = make_inputs(case, torch.float16, device=device)
    grad = torch.randn((case.batch, case.out_channels, *case.output_size()), device=device)
    first, second = (branch(inputs, case, "triton", grad) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_empty_batch(device: str) -> None:
    case = Case("empty", 0, 16, 16, (5, 5))
    inputs = make_inputs(case, device=device)
    got = branch(inputs, case, "triton", torch.empty(0, 16, 5, 5, device=device))
    assert got["u3"].shape == (0, 16, 5, 5)
    assert got["x3"].shape == (0, 8, 5, 5)
    assert not got["weight_gwc"].any()
    assert not got["weight_pwc"].any()


def test_nan_reaches_the_pixels_that_read_it_and_no_others(device: str) -> None:
    case = BY_NAME["plain"]
    inputs = make_inputs(case, device=device)
    with torch.no_grad():
        inputs.x[0, 0, 3, 4] = float("nan")
    got = branch(inputs, case, "triton")["u3"].isnan()
    assert torch.equal(got, branch(inputs, case, "reference")["u3"].isnan())
    assert got.any()
