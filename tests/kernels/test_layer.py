"""The whole layer on its kernels against float64."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import BY_NAME, SMALL, Case, assert_agrees, assert_agrees_over_draws, make_inputs, output_grad, run

from spconv_triton import SPConv2d, functional

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_agrees_with_float64(case: Case, device: str) -> None:
    assert_agrees(functional.spconv2d, make_inputs(case, device=device, branch_bias=True), backend="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["odd-pixels", "stride-2-odd", "alpha-1"])
def test_half_precision(name: str, dtype: torch.dtype, device: str) -> None:
    assert_agrees(functional.spconv2d, make_inputs(BY_NAME[name], dtype, device=device), backend="triton")


@pytest.mark.parametrize("gate", [-50.0, 50.0])
def test_saturated_gate(gate: float, device: str) -> None:
    inputs = make_inputs(BY_NAME["plain"], device=device, gate=gate)
    assert_agrees(functional.spconv2d, inputs, condition=abs(gate), backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_means(dtype: torch.dtype, device: str) -> None:
    """The weights' gradients hold A3 - A1, in which the mean cancels: each is the product of sums as large as it is.

    The reference cancels as well, by other sums, and either may be the luckier one.
    """
    mean = 30.0
    inputs = make_inputs(BY_NAME["odd-pixels"], dtype, device=device, mean=mean)
    assert_agrees(functional.spconv2d, inputs, names=("y", "x", "bias"), condition=mean / 4, backend="triton")
    assert_agrees(functional.spconv2d, inputs, condition=mean, backend="triton")


@pytest.mark.parametrize(("kind", "draws"), [({"mean": 30.0}, 16), ({"gate": -50.0}, 4), ({"gate": 50.0}, 4)], ids=str)
def test_large_means_and_saturated_gates_over_many_draws(kind: dict[str, float], draws: int, device: str) -> None:
    inputs = functools.partial(make_inputs, BY_NAME["tiny"], device=device, **kind)
    assert_agrees_over_draws(functional.spconv2d, inputs, draws, backend="triton")


def test_keeps_the_memory_format(device: str) -> None:
    case = BY_NAME["plain"]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        inputs = make_inputs(case, device=device, memory_format=memory_format)
        y = run(functional.spconv2d, inputs, backend="triton")["y"]
        assert y.is_contiguous(memory_format=memory_format)


def test_expanded_and_offset_input(device: str) -> None:
    case = BY_NAME["plain"]
    inputs = make_inputs(case, device=device)
    base = torch.randn(1, case.in_channels, case.size[0] + 1, case.size[1] + 2, device=device)
    inputs.x = base[:, :, 1:, 2:].expand(case.batch, -1, -1, -1).detach().requires_grad_()
    assert_agrees(functional.spconv2d, inputs, backend="triton")


def test_biases_with_gaps(device: str) -> None:
    inputs = make_inputs(BY_NAME["tiny"], device=device, branch_bias=True)
    for name in ("bias", "branch_bias"):
        dense = getattr(inputs, name).detach()
        setattr(inputs, name, torch.stack((dense, dense + 1), -1)[..., 0].requires_grad_())
    assert_agrees(functional.spconv2d, inputs, backend="triton")
    scale = torch.rand(inputs.weight_gwc.shape[0], 2, device=device)[:, 0]
    with torch.no_grad():
        got, expected = (
            functional.spconv2d_inference(*inputs.positional(), **inputs.window, norm_scale=scale, backend=backend)
            for backend in ("triton", "reference")
        )
    torch.testing.assert_close(got, expected)


def test_branch_norm_in_training(device: str) -> None:
    layer = SPConv2d(16, 24, 3, padding=1, branch_norm=True, backend="triton", device=device)
    twin = SPConv2d(16, 24, 3, padding=1, branch_norm=True, backend="reference", device=device)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(3, 16, 5, 6, device=device)
    torch.testing.assert_close(layer(x), twin(x))
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[key], msg=key)


def test_gradients_accumulate_over_two_calls(device: str) -> None:
    case = BY_NAME["tiny"]
    inputs = make_inputs(case, device=device)
    grad = output_grad(inputs)
    once = run(functional.spconv2d, inputs, grad, backend="triton")["weight_gwc"]
    for _ in range(2):
        y = functional.spconv2d(*inputs.positional(), **inputs.window, backend="triton")
        y.backward(grad)
    torch.testing.assert_close(inputs.weight_gwc.grad, 2 * once)
