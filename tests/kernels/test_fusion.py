"""The GAP / softmax fusion's kernels against float64."""

from __future__ import annotations

import pytest
import torch
from cases import assert_within_budget
from torch import Tensor

from spconv_triton import functional, reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((2, 32, 8, 8), (3, 18, 7, 5), (1, 7, 1, 1), (2, 40, 9, 1), (2, 20, 20, 30))


def fuse(u3: Tensor, u1: Tensor, grad: Tensor, backend: str) -> dict[str, Tensor]:
    u3, u1 = (u.detach().requires_grad_() for u in (u3, u1))
    if backend == "reference":
        y = reference.gap_softmax_fusion(u3, u1)
    else:
        y = functional.gap_softmax_fusion(u3, u1, backend=backend)
    du3, du1 = torch.autograd.grad(y, (u3, u1), grad.to(y.dtype))
    return {"y": y.detach(), "u3": du3, "u1": du1}


def branches(shape: tuple[int, ...], dtype: torch.dtype, device: str, *, mean: float = 0.0, gate: float = 0.0):
    """U3, U1 and an upstream gradient."""
    u3, u1, grad = (torch.randn(shape, device=device) for _ in range(3))
    tensors = (u3 + mean + gate, u1 + mean, grad)
    return tuple(t.to(dtype).contiguous(memory_format=torch.channels_last) for t in tensors)


def check(u3: Tensor, u1: Tensor, grad: Tensor, *, condition: float = 1.0) -> None:
    got, same_dtype = (fuse(u3, u1, grad, backend) for backend in ("triton", "reference"))
    exact = fuse(u3.double(), u1.double(), grad.double(), "reference")
    for name, value in exact.items():
        assert_within_budget(name, got[name], same_dtype[name], value, condition=condition)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check(*branches(shape, dtype, device))


@pytest.mark.parametrize("gate", [-200.0, -20.0, 20.0, 200.0])
def test_saturated_gate(gate: float, device: str) -> None:
    check(*branches((2, 16, 5, 4), torch.float32, device, gate=gate), condition=abs(gate))


def test_large_mean(device: str) -> None:
    check(*branches((2, 16, 9, 8), torch.float32, device, mean=1000.0))


def test_mixed_layouts(device: str) -> None:
    u3, u1, grad = branches((2, 16, 6, 5), torch.float32, device)
    check(u3.contiguous(), u1, grad.contiguous())


def test_same_input_same_bits(device: str) -> None:
    tensors = branches((2, 24, 20, 15), torch.bfloat16, device)
    first, second = (fuse(*tensors, "triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_empty_batch(device: str) -> None:
    got = fuse(*branches((0, 8, 4, 4), torch.float32, device), "triton")
    assert all(value.shape == (0, 8, 4, 4) for value in got.values())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_fills_its_plane_and_no_other(value: float, device: str) -> None:
    u3, u1, grad = branches((2, 8, 3, 3), torch.float32, device)
    clean = fuse(u3, u1, grad, "triton")["y"]
    u3[0, 1, 2, 0] = value
    got, expected = (fuse(u3, u1, grad, backend) for backend in ("triton", "reference"))
    for name, tensor in got.items():
        assert (tensor.isnan() >= expected[name].isnan()).all(), name
        assert tensor[0, 1].isnan().all(), name
    got = got["y"]
    elsewhere = torch.ones(2, 8, dtype=torch.bool, device=device)
    elsewhere[0, 1] = False
    assert torch.equal(got[elsewhere], clean[elsewhere])
