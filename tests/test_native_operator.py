"""The operators that a compiled layer calls on a CPU; eager layers call what they call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import SMALL, Case, Inputs, assert_agrees, assert_within_budget, make_inputs, output_grad, run
from packaging.version import Version
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spconv_triton import functional, ops, reference
from spconv_triton.geometry import resolve

BY_NAME = {case.name: case for case in SMALL}
CASES = [BY_NAME[name] for name in ("plain", "stride-2-odd", "odd-pixels")]
NEEDED = ([True] * 6, [True, False, True, False, False, True], [False, True, False, True, True, False])


def arguments_of(inputs: Inputs) -> tuple[Any, ...]:
    *window, groups = resolve(tuple(inputs.weight_gwc.shape[2:]), **inputs.window)[1:]
    return (*inputs.positional(), inputs.branch_bias, *map(list, window), groups)


def layer(*tensors: Any, branch_bias: Tensor | None, **window: Any) -> Tensor:
    """The operator, called as :func:`spconv_triton.functional.spconv2d` is."""
    geometry = resolve(tuple(tensors[1].shape[2:]), **window)
    return ops.native_spconv2d(*tensors, branch_bias, *geometry[1:])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_passes_opcheck(case: Case, dtype: torch.dtype) -> None:
    for options in ({"bias": False}, {"branch_bias": True}, {"memory_format": torch.contiguous_format}):
        torch.library.opcheck(ops.native_spconv2d, arguments_of(make_inputs(case, dtype, **options)))


@pytest.mark.parametrize(("case", "needed"), list(zip(CASES, NEEDED, strict=True)), ids=str)
def test_backward_passes_opcheck(case: Case, needed: list[bool]) -> None:
    """In float64: second derivatives, which it has too, differ by order of summation."""
    inputs = make_inputs(case, torch.float64, branch_bias=True)
    arguments = arguments_of(inputs)
    with torch.no_grad():
        y, d = ops.native_spconv2d(*arguments)
    grad = torch.randn_like(y).requires_grad_()
    operands = (grad, *arguments[:6], d, *arguments[6:], needed)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if Version(torch.__version__) >= Version("2.12"):  # before, torch.func.vjp is not traced with sizes that may vary
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.native_spconv2d_backward, operands, test_utils=checks)
    results = ops.native_spconv2d_backward(*operands)
    for result, tensor, need in zip(results, arguments[:6], needed, strict=True):
        assert result.shape == (tensor.shape if need else (0,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(case: Case, dtype: torch.dtype) -> None:
    for options in ({"bias": False}, {"branch_bias": True}):
        assert_agrees(layer, make_inputs(case, dtype, **options))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_are_laid_out_as_weights_are(layout: torch.memory_format) -> None:
    inputs = make_inputs(BY_NAME["plain"])
    for name in ("weight_gwc", "weight_pwc", "weight_redundant"):
        weight = inputs.tensors()[name].detach().contiguous(memory_format=layout).requires_grad_()
        inputs = replace(inputs, **{name: weight})
    found = run(layer, inputs, output_grad(inputs))
    expected = run(functional.spconv2d, inputs, output_grad(inputs))
    assert found["x"].is_contiguous(memory_format=torch.channels_last)
    for name in ("weight_gwc", "weight_pwc", "weight_redundant"):
        assert found[name].is_contiguous(memory_format=layout)
        assert found[name].shape == expected[name].shape


def test_is_what_an_eager_layer_does_bit_by_bit() -> None:
    inputs = make_inputs(BY_NAME["odd-pixels"], branch_bias=True)
    grad = output_grad(inputs)
    expected = run(functional.spconv2d, inputs, grad, backend="native")
    for name, result in run(layer, inputs, grad).items():
        assert torch.equal(result, expected[name]), name


def test_second_derivatives() -> None:
    inputs = make_inputs(BY_NAME["stride-2-odd"], torch.float64, branch_bias=True)
    geometry = resolve(tuple(inputs.weight_gwc.shape[2:]), **inputs.window)
    leaves = (*inputs.positional(), inputs.branch_bias)
    assert torch.autograd.gradgradcheck(
        lambda *tensors: ops.native_spconv2d(*tensors, *geometry[1:])[0], leaves, fast_mode=True
    )


def test_flops_are_counted() -> None:
    inputs = make_inputs(BY_NAME["stride-2-odd"])
    with FlopCounterMode(display=False) as counter:
        y = layer(*inputs.positional(), branch_bias=None, **inputs.window)
    forward = counter.get_total_flops()
    macs = sum(w.numel() for w in (inputs.weight_gwc, inputs.weight_pwc, inputs.weight_redundant))
    assert forward == 2 * macs * y.shape[0] * y.shape[2] * y.shape[3]
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward


@pytest.mark.parametrize("frozen", ["weights", "x"])
def test_compiled_layer_with_some_gradients_only(frozen: str) -> None:
    inputs = make_inputs(BY_NAME["odd-pixels"], bias=False)
    names = ("x",) if frozen == "x" else ("weight_gwc", "weight_pwc", "weight_redundant")
    inputs = replace(inputs, **{name: inputs.tensors()[name].detach() for name in names})
    wanted = [t for t in inputs.tensors().values() if t.requires_grad]
    torch._dynamo.reset()

    def gradients(function: Any) -> tuple[Tensor, ...]:
        y = function(*inputs.positional(), **inputs.window)
        return torch.autograd.grad(y.square().sum(), wanted)

    compiled = torch.compile(functional.spconv2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled), gradients(functional.spconv2d))


def test_compiled_layer_follows_the_precision_of_matrix_products() -> None:
    """What was compiled into matrix products is compiled anew when those may be of bfloat16."""
    inputs = make_inputs(BY_NAME["plain"])
    compiled = torch.compile(functional.spconv2d, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch.no_grad():
        exact = functional.spconv2d(*inputs.positional(), **inputs.window)
        torch.testing.assert_close(compiled(*inputs.positional(), **inputs.window), exact)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            torch.testing.assert_close(compiled(*inputs.positional(), **inputs.window), exact)
        finally:
            torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("size", [(3, 4), (9, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_inference_agrees(dtype: torch.dtype, size: tuple[int, int]) -> None:
    """Whichever comes first, the gate (on maps of more pixels than x has channels) or the branches."""
    inputs = make_inputs(replace(BY_NAME["plain"], size=size), dtype, branch_bias=True)
    torch._dynamo.reset()
    compiled = torch.compile(functional.spconv2d, fullgraph=True)
    with torch.no_grad():
        got, same_dtype = run(compiled, inputs)["y"], run(reference.spconv2d, inputs)["y"]
        exact = run(reference.spconv2d, inputs.to(torch.float64))["y"]
    # Inductor adds the terms of a sum one after the other.
    assert_within_budget("y", got, same_dtype, exact, condition=16.0)
