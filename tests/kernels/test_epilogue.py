"""What follows the layer in inference, inside its convolution kernel, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BY_NAME, Case, Inputs, assert_within_budget, make_inputs
from test_inference import ACTIVATIONS, expected, following
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch.utils.flop_counter import FlopCounterMode

from spconv_triton import functional, launch, ops

pytestmark = pytest.mark.usefixtures("poisoned_empty")

WIDE = Case("wide", 2, 64, 64, (2, 3), groups=1)
AFTER = [("none", True), ("relu", False), ("relu6", True), ("silu", False), ("silu", True)]
NAN_AND_INFINITIES = (float("nan"), float("inf"), float("-inf"))


def layer(inputs: Inputs, case: Case, path: str, after: dict[str, Any]) -> Tensor:
    """The layer on one of the paths, as its operator calls it."""
    tensors = (inputs.x, inputs.weight_gwc, inputs.weight_pwc, inputs.weight_redundant, inputs.bias, inputs.branch_bias)
    with torch.no_grad(), set_wrap_triton_enabled(False):
        return launch.spconv2d(*tensors, case.geometry, path=path, **after)[0]


def check(inputs: Inputs, case: Case, path: str, after: dict[str, Any]) -> None:
    y = layer(inputs, case, path, after)
    assert_within_budget("y", y, expected(inputs, after), expected(inputs, after, torch.float64))


@pytest.mark.parametrize(("activation", "residual"), AFTER)
@pytest.mark.parametrize("name", ["tiny", "tiny-stride-2"])
def test_flat(name: str, activation: str, residual: bool, device: str) -> None:
    case = BY_NAME[name]
    inputs = make_inputs(case, device=device, branch_bias=residual)
    check(inputs, case, "flat", following(case, activation, residual=residual, device=device))


@pytest.mark.parametrize(("activation", "residual"), AFTER)
def test_descriptor(activation: str, residual: bool, device: str) -> None:
    inputs = make_inputs(WIDE, torch.float16, device=device, branch_bias=residual)
    check(inputs, WIDE, "descriptor", following(WIDE, activation, torch.float16, residual=residual, device=device))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities in the interpreter
@pytest.mark.parametrize("path", ["flat", "descriptor"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinities_come_out_as_torch_s(activation: str, path: str, device: str) -> None:
    inputs = make_inputs(WIDE, torch.float16, device=device)
    for m, value in enumerate(NAN_AND_INFINITIES):
        inputs.bias.data[m] = value
    after = {"activation": activation}
    y = layer(inputs, WIDE, path, after)
    first = slice(0, len(NAN_AND_INFINITIES))
    torch.testing.assert_close(y[:, first], expected(inputs, after)[:, first], equal_nan=True)
    assert y[:, 3:].isfinite().all()


@pytest.mark.parametrize("name", ["tiny-stride-2", "alpha-1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_function(dtype: torch.dtype, name: str, device: str) -> None:
    """Through the operator, in either memory format; without a gate the epilogue is ATen's."""
    case = BY_NAME[name]
    for memory_format in (torch.channels_last, torch.contiguous_format):
        inputs = make_inputs(case, dtype, device=device, memory_format=memory_format, branch_bias=True)
        after = following(case, "silu", dtype, residual=True, device=device)
        with torch.no_grad():
            y = functional.spconv2d_inference(
                *inputs.positional(), branch_bias=inputs.branch_bias, **inputs.window, **after, backend="triton"
            )
        assert_within_budget("y", y, expected(inputs, after), expected(inputs, after, torch.float64))
        assert y.is_contiguous(memory_format=memory_format)


def test_residual_of_other_strides(device: str) -> None:
    case = BY_NAME["tiny"]
    inputs = make_inputs(case, device=device)
    after = following(case, "relu", residual=True, device=device)
    after["residual"] = after["residual"].contiguous().transpose(2, 3).contiguous().transpose(2, 3)
    check(inputs, case, "flat", after)


def operator_arguments(name: str, residual: bool, device: str) -> tuple[Any, ...]:
    case = BY_NAME[name]
    inputs = make_inputs(case, device=device, bias=residual, branch_bias=residual)
    after = following(case, "relu6", residual=residual, device=device)
    tensors = [None if t is None else t.detach() for t in (*inputs.positional(), inputs.branch_bias)]
    window = (*map(list, (case.stride, case.padding, case.dilation)), case.groups)
    return *tensors, after["norm_scale"], after.get("residual"), after["activation"], *window


@pytest.mark.parametrize("residual", [False, True])
def test_operator_passes_opcheck(residual: bool, device: str) -> None:
    name = "tiny-stride-2" if residual else "tiny"
    arguments = operator_arguments(name, residual, device)
    torch.library.opcheck(torch.ops.spconv_triton.spconv2d_inference.default, arguments)


def test_operator_counts_the_flops_of_the_layer(device: str) -> None:
    arguments = operator_arguments("tiny", False, device)
    with FlopCounterMode(display=False) as fused:
        ops.spconv2d_inference(*arguments)
    with FlopCounterMode(display=False) as alone:
        ops.spconv2d(*arguments[:6], *arguments[9:])
    assert fused.get_total_flops() == alone.get_total_flops() > 0
