"""The layer in inference with what follows it: norm, bias, residual, activation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BY_NAME,
    RESNET50,
    SMALL,
    Case,
    Inputs,
    assert_within_budget,
    assert_within_budget_over_draws,
    make_inputs,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spconv_triton import reference
from spconv_triton.functional import spconv2d, spconv2d_inference
from spconv_triton.native import parts
from spconv_triton.native import weights as native_weights
from spconv_triton.native.products import can_be_matrix_product

ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def following(
    case: Case,
    activation: str,
    dtype: torch.dtype = torch.float32,
    *,
    residual: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Keyword arguments of ``spconv2d_inference``: a norm with scales of either sign, and the rest."""
    after: dict[str, Any] = {"norm_scale": torch.randn(case.out_channels, device=device), "activation": activation}
    if residual:
        shape = (case.batch, case.out_channels, *case.output_size())
        added = torch.randn(shape, device=device).to(dtype)
        after["residual"] = added.contiguous(memory_format=torch.channels_last)
    return after


def expected(inputs: Inputs, after: dict[str, Any], dtype: torch.dtype | None = None) -> Tensor:
    """Eager PyTorch: the reference, then everything that follows, a rounding after each; in ``dtype`` or that of x."""
    dtype = dtype or inputs.x.dtype
    x, gwc, pwc, redundant, bias, branch_bias = (
        None if t is None else t.detach().to(dtype) for t in (*inputs.positional(), inputs.branch_bias)
    )
    y = reference.spconv2d(x, gwc, pwc, redundant, branch_bias=branch_bias, **inputs.window)
    if "norm_scale" in after:
        y = y * after["norm_scale"].to(dtype)[:, None, None]
    if bias is not None:
        y = y + bias[:, None, None]
    if "residual" in after:
        y = y + after["residual"].to(dtype)
    return ACTIVATIONS[after["activation"]](y)


def judged(inputs: Inputs, after: dict[str, Any], backend: str = "native") -> tuple[Tensor, Tensor, Tensor]:
    """The operator's result, that of eager PyTorch in the same dtype, and in float64."""
    before = {name: t.detach().clone() for name, t in {**inputs.tensors(), **tensors_of(after)}.items()}
    with torch.no_grad():
        y = spconv2d_inference(
            *inputs.positional(), branch_bias=inputs.branch_bias, **inputs.window, **after, backend=backend
        )
    for name, tensor in {**inputs.tensors(), **tensors_of(after)}.items():
        assert torch.equal(tensor, before[name]), f"{name} was written to"
    return y, expected(inputs, after), expected(inputs, after, torch.float64)


def check(inputs: Inputs, after: dict[str, Any], *, backend: str = "native") -> Tensor:
    y, same_dtype, exact = judged(inputs, after, backend)
    assert_within_budget("y", y, same_dtype, exact)
    return y


def check_over_draws(draw: Callable[[], tuple[Inputs, dict[str, Any]]], draws: int = 3) -> None:
    results = (judged(*draw()) for _ in range(draws))
    assert_within_budget_over_draws(tuple({"y": result} for result in each) for each in results)


def tensors_of(after: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in after.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_agrees_with_float64(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for cached, pixels in ((parts.CACHED, 1 << 30), (1, 1 << 30), (1, 0)):
        monkeypatch.setattr(parts, "CACHED", cached)  # all samples together, or each by itself
        monkeypatch.setattr(native_weights, "GATED_PIXELS", pixels)  # the gate last, or first
        monkeypatch.setattr(native_weights, "GATED_BYTES", 0)
        monkeypatch.setattr(
            native_weights, "gate_comes_first", lambda x, _, first=pixels == 0: first and can_be_matrix_product(x)
        )
        for activation in ACTIVATIONS:
            after = functools.partial(following, case, activation, dtype, residual=True)
            check_over_draws(lambda after=after: (make_inputs(case, dtype, branch_bias=True), after()))
        check_over_draws(lambda: (make_inputs(case, dtype, bias=False), following(case, "relu", dtype)))
        check_over_draws(lambda: (make_inputs(case, dtype), {"activation": "silu"}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_agrees_too(dtype: torch.dtype) -> None:
    case = BY_NAME["odd-pixels"]
    inputs = make_inputs(case, dtype, branch_bias=True)
    check(inputs, following(case, "silu", dtype, residual=True), backend="reference")


@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_agrees_on_the_layers_of_resnet50(case: Case) -> None:
    case = replace(case, batch=1)
    check(make_inputs(case), following(case, "relu", residual=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_bias_and_scale_are_not_rounded(dtype: torch.dtype) -> None:
    case = BY_NAME["tiny"]
    inputs = make_inputs(case, dtype, bias=False)
    inputs.bias = 1 + torch.rand(case.out_channels) / 1000
    weights = (torch.zeros_like(t) for t in (inputs.weight_gwc, inputs.weight_pwc, inputs.weight_redundant))
    with torch.no_grad():
        y = spconv2d_inference(
            inputs.x, *weights, inputs.bias, **inputs.window, norm_scale=torch.ones_like(inputs.bias)
        )
    assert torch.equal(y, inputs.bias.to(dtype)[:, None, None].expand_as(y))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_keeps_the_memory_format(memory_format: torch.memory_format) -> None:
    case = BY_NAME["plain"]
    y = check(make_inputs(case, memory_format=memory_format), following(case, "relu", residual=True))
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_survives(activation: str) -> None:
    case = BY_NAME["plain"]
    inputs = make_inputs(case)
    inputs.x.data[0, 0, 3, 3] = float("nan")
    with torch.no_grad():
        y = spconv2d_inference(*inputs.positional(), **inputs.window, activation=activation)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


def test_nothing_to_follow_is_the_layer() -> None:
    inputs = make_inputs(BY_NAME["plain"])
    with torch.no_grad():
        y = spconv2d_inference(*inputs.positional(), **inputs.window)
        assert torch.equal(y, spconv2d(*inputs.positional(), **inputs.window))


def test_takes_an_empty_batch() -> None:
    case = Case(**{**vars(BY_NAME["plain"]), "batch": 0})
    y = check(make_inputs(case), following(case, "relu", residual=True))
    assert y.shape == (0, case.out_channels, *case.output_size())


def test_counts_the_flops_of_the_layer() -> None:
    case = BY_NAME["plain"]
    inputs = make_inputs(case)
    with torch.no_grad(), FlopCounterMode(display=False) as fused:
        spconv2d_inference(*inputs.positional(), **inputs.window, **following(case, "relu", residual=True))
    with torch.no_grad(), FlopCounterMode(display=False) as alone:
        spconv2d(*inputs.positional(), **inputs.window)
    assert fused.get_total_flops() == alone.get_total_flops() > 0


def test_autocast_casts_as_for_a_convolution() -> None:
    case = BY_NAME["plain"]
    inputs = make_inputs(case)
    after = following(case, "relu", residual=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = spconv2d_inference(*inputs.positional(), **inputs.window, **after)
    assert y.dtype == torch.bfloat16
    cast = inputs.to(torch.bfloat16)
    cast.bias = inputs.bias
    assert_within_budget("y", y, expected(cast, after), expected(cast, after, torch.float64))


def test_vmap() -> None:
    case = BY_NAME["odd-pixels"]
    inputs = make_inputs(case, memory_format=torch.contiguous_format)
    after = following(case, "relu6")
    weights = [t.detach() for t in inputs.positional()[1:]]

    def layer(x: Tensor) -> Tensor:
        return spconv2d_inference(x[None], *weights, **inputs.window, **after)[0]

    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(inputs.x.detach()), check(inputs, after))


def test_compiles_whole() -> None:
    case = BY_NAME["stride-2-odd"]
    inputs = make_inputs(case, branch_bias=True)
    after = following(case, "silu", residual=True)
    compiled = torch.compile(spconv2d_inference, fullgraph=True)
    with torch.no_grad():
        y = compiled(*inputs.positional(), branch_bias=inputs.branch_bias, **inputs.window, **after)
    assert_within_budget("y", y, expected(inputs, after), expected(inputs, after, torch.float64))


@pytest.mark.parametrize("name", ["x", "weight_gwc", "weight_pwc", "weight_redundant", "bias", "branch_bias"])
def test_refuses_what_requires_gradients(name: str) -> None:
    inputs = make_inputs(BY_NAME["plain"], branch_bias=True)
    for other, tensor in inputs.tensors().items():
        tensor.requires_grad_(other == name)
    arguments = inputs.positional()
    with pytest.raises(ValueError, match=f"^{name} must not require gradients, which spconv2d_inference does not have"):
        spconv2d_inference(*arguments, branch_bias=inputs.branch_bias, **inputs.window)
    with torch.no_grad():
        spconv2d_inference(*arguments, branch_bias=inputs.branch_bias, **inputs.window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_bias_without_a_gate(dtype: torch.dtype) -> None:
    case = BY_NAME["alpha-1"]
    inputs = make_inputs(case, dtype, bias=False)
    bias = 1 + torch.rand(case.out_channels) / 1000
    weights = (torch.zeros_like(t) for t in (inputs.weight_gwc, inputs.weight_pwc))
    with torch.no_grad():
        y = spconv2d_inference(inputs.x, *weights, None, bias, **inputs.window)
    assert torch.equal(y, bias.to(dtype)[:, None, None].expand_as(y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reference_rounds_once(dtype: torch.dtype) -> None:
    case = BY_NAME["tiny"]
    inputs = make_inputs(case, dtype, bias=False)
    bias = 1 + torch.rand(case.out_channels) / 1000
    weights = (torch.zeros_like(t) for t in (inputs.weight_gwc, inputs.weight_pwc, inputs.weight_redundant))
    residual = -torch.ones(case.batch, case.out_channels, *case.output_size(), dtype=dtype)
    with torch.no_grad():
        y = spconv2d_inference(inputs.x, *weights, bias, **inputs.window, residual=residual, backend="reference")
    assert torch.equal(y, (bias - 1).to(dtype)[:, None, None].expand_as(y))


def test_no_redundant_channel_is_no_gate() -> None:
    i = make_inputs(BY_NAME["alpha-1"])
    empty = i.weight_pwc.detach().new_empty(i.weight_pwc.shape[0], 0, 1, 1)
    with torch.no_grad():
        expected = spconv2d(i.x, i.weight_gwc, i.weight_pwc, None, i.bias, **i.window).relu()
        for backend in ("native", "reference"):
            arguments = (i.x, i.weight_gwc, i.weight_pwc, empty, i.bias)
            y = spconv2d_inference(*arguments, **i.window, activation="relu", backend=backend)
            torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norm_and_bias_without_a_gate(dtype: torch.dtype) -> None:
    case = BY_NAME["alpha-1"]
    check_over_draws(lambda: (make_inputs(case, dtype), following(case, "relu", dtype)))


@pytest.mark.parametrize("name", ["norm_scale", "residual"])
def test_refuses_gradients_of_what_follows(name: str) -> None:
    case = BY_NAME["plain"]
    tensors = {key: value.detach() for key, value in make_inputs(case).tensors().items()}
    after = following(case, "relu", residual=True)
    after[name].requires_grad_()
    weights = (tensors[key] for key in ("x", "weight_gwc", "weight_pwc", "weight_redundant"))
    with pytest.raises(ValueError, match=f"{name} must not require gradients"):
        spconv2d_inference(*weights, **case.window, **after)
