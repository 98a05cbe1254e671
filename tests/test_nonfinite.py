"""NaN and infinities in any argument come out as in the reference, forward and backward."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import Case, Inputs, make_inputs, native, run
from hypothesis import given
from nonfinite import assert_spreads_as_in_the_reference
from strategies import NOT_FINITE, calls_with_what_is_not_finite

from spconv_triton import SPConv2d, reference
from spconv_triton.epilogue import activate
from spconv_triton.functional import gap_softmax_fusion, spconv2d_inference
from spconv_triton.geometry import resolve
from spconv_triton.native import folding, parts, weights


@given(inputs=calls_with_what_is_not_finite())
def test_any_layer_spreads_them_as_the_reference(inputs: Inputs) -> None:
    # In bfloat16 oneDNN pairs channels, and multiplies the neighbour of a slice by zero: NaN, if that is infinite.
    extent = "more" if inputs.x.dtype == torch.bfloat16 else "exact"
    assert_spreads_as_in_the_reference(native, inputs, extent=extent)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_zeros_among_merged_weights_spread_nothing(value: float) -> None:
    """At the edge without padding, x3 is read by its own group and no point-wise convolution; gradients are too."""
    inputs = make_inputs(Case("edge", 2, 8, 8, (6, 5), padding=(0, 0)), bias=False)
    inputs.x.data[0, 1, 0, 0] = value
    assert folding.merging_pays(inputs.x, inputs.weight_gwc, resolve((3, 3), 1, 0, 1, 2))
    assert_spreads_as_in_the_reference(native, inputs)
    inputs.x.data[0, 1, 0, 0] = 1.0
    grad = torch.randn(2, 8, 4, 3)
    grad[0, 5, 1, 1] = value
    found, expected = (run(layer, inputs, grad) for layer in (native, reference.spconv2d))
    for name, tensor in expected.items():
        assert torch.equal(found[name].isnan(), tensor.isnan()), name
        assert torch.equal(found[name].isinf(), tensor.isinf()), name


@pytest.mark.parametrize("backend", [pytest.param("inductor", marks=pytest.mark.slow), "aot_eager"])
def test_compiled(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(native, fullgraph=True, backend=backend)
    case = Case("compiled", 2, 9, 8, (5, 6), stride=(1, 2))
    names = list(make_inputs(case, branch_bias=True).tensors())
    for value in NOT_FINITE:
        for name in names:
            inputs = make_inputs(case, branch_bias=True)
            tensor = inputs.tensors()[name].data
            tensor[tuple(torch.randint(size, ()) for size in tensor.shape)] = value
            # A weight over padding: NaN to some convolutions and not to others.
            extent = "planes" if name == "weight_gwc" else "exact"
            assert_spreads_as_in_the_reference(compiled, inputs, extent=extent)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_inference(value: float, merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The activations keep NaN, the gate makes it: as :func:`functional.spconv2d`. Also of one sample among others."""
    monkeypatch.setattr(weights, "is_worth_merging", lambda *_: merged)
    monkeypatch.setattr(parts, "CACHED", 1)
    inputs = make_inputs(Case("plain", 2, 8, 8, (5, 4)))
    inputs.x.data[0, int(torch.randint(8, ())), 2, 2] = value
    with torch.no_grad():
        expected = run(reference.spconv2d, inputs)["y"]
        for activation in ("none", "relu", "relu6", "silu"):
            y = spconv2d_inference(*inputs.positional(), **inputs.window, activation=activation, backend="native")
            assert torch.equal(y.isnan(), activate(expected, activation).isnan())


@pytest.mark.parametrize("value", NOT_FINITE)
def test_fusion(value: float) -> None:
    u3, u1 = torch.randn(2, 2, 3, 4, 5)
    for u in (u3, u1):
        clean = u.clone()
        u[1, 2, 3, 0] = value
        y, expected = gap_softmax_fusion(u3, u1, backend="native"), reference.gap_softmax_fusion(u3, u1)
        torch.testing.assert_close(y, expected, equal_nan=True)
        u.copy_(clean)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_without_a_gate_zeros_spread_nothing(value: float, training: bool) -> None:
    layer = SPConv2d(8, 8, 3, padding=1, alpha=1.0, backend="native").train(training)
    other = copy.deepcopy(layer)
    other.backend = "reference"
    x = torch.randn(1, 8, 6, 5)
    x[0, 1, 2, 2] = value
    with torch.inference_mode():
        for _ in range(3):
            y = layer(x)
        assert not (y.isnan() & ~other(x).isnan()).any()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_sample_among_others_by_prepared_weights(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "CACHED", 1)
    layer = SPConv2d(8, 8, 3, padding=1, backend="native").eval()
    x = torch.randn(3, 8, 5, 4)
    x[1, 3, 2, 2] = value
    with torch.inference_mode():
        y = layer(x)
        layer.backend = "reference"
        expected = layer(x)
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y[::2], expected[::2])
