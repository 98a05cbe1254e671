"""The ATen path as ``torch.compile`` traces it: what Inductor is given, and what the layer keeps then."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import BY_NAME, RESNET50, assert_agrees, kept_beside_parameters, make_inputs, run
from packaging.version import Version
from torch import Tensor

from spconv_triton import functional, reference
from spconv_triton.native import traced

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SATURATED = (100.0, -100.0)


def aot(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def branches(dtype: torch.dtype = torch.float32, apart: float = 0.0) -> list[Tensor]:
    """U3 and U1, their means some way apart."""
    return [(torch.randn(2, 5, 4, 3, dtype=dtype) + shift).requires_grad_() for shift in (apart, 0.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fusion_passes_opcheck(dtype: torch.dtype) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if Version(torch.__version__) >= Version("2.12"):
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(traced.gap_softmax_fusion, tuple(branches(dtype)), test_utils=checks)


def test_fusion_is_differentiable_twice() -> None:
    leaves = branches(torch.float64)
    assert torch.autograd.gradcheck(traced.gap_softmax_fusion, leaves)
    assert torch.autograd.gradgradcheck(traced.gap_softmax_fusion, leaves)


@pytest.mark.parametrize("apart", SATURATED)
def test_a_saturated_gate_keeps_its_precision(apart: float) -> None:
    """Of the branch that it closes, the gradient is far below a rounding of the other's, and must not be rounding."""
    u3, u1 = branches(apart=apart / 5)
    exact = [u.detach().double().requires_grad_() for u in (u3, u1)]
    grad = torch.randn_like(u3)
    found = torch.autograd.grad(traced.gap_softmax_fusion(u3, u1), (u3, u1), grad)
    expected = torch.autograd.grad(reference.gap_softmax_fusion(*exact), exact, grad.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6 * other.abs().max().item())


@pytest.mark.drawn(
    6,
    ("name", "dtype"),
    itertools.product(
        ("plain", "stride-2-odd", "odd-pixels"), (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    ),
    ids=str,
)
def test_agrees_with_the_reference(name: str, dtype: torch.dtype) -> None:
    for options in ({"bias": False}, {"branch_bias": True}, {"memory_format": torch.contiguous_format}):
        assert_agrees(aot(functional.spconv2d), make_inputs(BY_NAME[name], dtype, **options), condition=16.0)


@pytest.mark.parametrize("frozen", ["weights", "x"])
def test_some_gradients_only(frozen: str) -> None:
    inputs = make_inputs(BY_NAME["odd-pixels"], bias=False)
    names = ("x",) if frozen == "x" else ("weight_gwc", "weight_pwc", "weight_redundant")
    inputs = replace(inputs, **{name: inputs.tensors()[name].detach() for name in names})
    wanted = [t for t in inputs.tensors().values() if t.requires_grad]

    def gradients(function: Any) -> tuple[Tensor, ...]:
        y = function(*inputs.positional(), **inputs.window)
        return torch.autograd.grad(y.square().sum(), wanted)

    torch.testing.assert_close(gradients(aot(functional.spconv2d)), gradients(functional.spconv2d))


def test_second_derivatives() -> None:
    """Where the compiler has them: AOTAutograd does not."""
    inputs = make_inputs(BY_NAME["stride-2-odd"], torch.float64, branch_bias=True)
    leaves = [t for t in (*inputs.positional(), inputs.branch_bias) if t is not None]

    def second(function: Any) -> tuple[Tensor, ...]:
        y = function(*inputs.positional(), branch_bias=inputs.branch_bias, **inputs.window)
        slopes = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(slope.square().sum() for slope in slopes), leaves)

    compiled = torch.compile(functional.spconv2d, fullgraph=True, backend="eager")
    torch.testing.assert_close(second(compiled), second(functional.spconv2d))


def test_follows_the_precision_of_matrix_products() -> None:
    """What was compiled into matrix products is compiled anew when those may be of bfloat16."""
    inputs = make_inputs(BY_NAME["plain"])
    compiled = aot(functional.spconv2d)
    with torch.no_grad():
        exact = functional.spconv2d(*inputs.positional(), **inputs.window)
        torch.testing.assert_close(compiled(*inputs.positional(), **inputs.window), exact)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            torch.testing.assert_close(compiled(*inputs.positional(), **inputs.window), exact)
        finally:
            torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_keeps_one_map_or_none(case: Any) -> None:
    """U3 - U1 beside x, or what the compiler is told to keep."""
    inputs = make_inputs(case, bias=False)
    # Inductor lays convolution weights out in channels_last and would keep its copy, as it does for nn.Conv2d.
    inputs.weight_gwc = inputs.weight_gwc.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    of_x = inputs.x.untyped_storage().nbytes()
    of_y = run(functional.spconv2d, inputs)["y"].numel() * inputs.x.itemsize
    margin = (0.25 if case.size == (7, 7) else 0.05) * of_x
    for budget, allowed in ((1.0, of_x + of_y), (0.5, of_x)):
        torch._dynamo.reset()
        with torch._functorch.config.patch(activation_memory_budget=budget):
            compiled = torch.compile(functional.spconv2d, fullgraph=True)
            assert kept_beside_parameters(compiled, inputs) <= allowed + margin
