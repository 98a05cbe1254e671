"""Prepared weights on ATen: each form agrees with float64, and is made once for each shape."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
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
from inference_cases import DTYPES
from torch import Tensor

from spconv_triton import SPConv2d, functional, reference
from spconv_triton.native import folding, onepass, parts, products
from spconv_triton.native import weights as native_weights
from spconv_triton.native.weights import AVAILABLE, PreparedWeights, are_preparable

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this PyTorch has no oneDNN")


def force(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have weights prepared in this form wherever it is right."""
    kept = folding.can_fold
    monkeypatch.setattr(folding, "MERGED_CHANNELS", 1 << 30 if form == "merged" else 0)
    monkeypatch.setattr(native_weights, "can_fold", lambda *layer: form in ("folded", "exchanged") and kept(*layer))
    if form == "exchanged":
        monkeypatch.setattr(products, "ONEDNN_IS_WIDER", True)
        monkeypatch.setattr(products, "LARGE_PRODUCT", 0)
        monkeypatch.setattr(native_weights, "EXCHANGED_CHANNELS", 1)
    if form == "gate first":
        monkeypatch.setattr(native_weights, "GATED_BYTES", 0)
        monkeypatch.setattr(native_weights, "GATED_PIXELS", 0)


def is_preparable(case: Case, dtype: torch.dtype) -> bool:
    x = torch.empty(case.batch, case.in_channels, *case.size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.empty(case.out_channels, case.representative // case.groups, *case.kernel_size, dtype=dtype)
    return are_preparable(x, weight, case.geometry)


def forms_of(case: Case, dtype: torch.dtype) -> Iterator[str]:
    """Those that there are of a layer's weights."""
    same, has_gate = folding.reads_the_same(case.geometry, *case.size), case.alpha < 1
    if same and has_gate:
        yield "merged"
    if same and case.groups <= 2:
        yield "folded"
        if case.groups == 2 and dtype == torch.float32:
            yield "exchanged"
    yield "prepared"
    if has_gate:
        yield "gate first"


def in_every_form(cases: Iterable[Case]) -> list[tuple[Case, str, torch.dtype]]:
    return [
        (case, form, dtype)
        for case, dtype in itertools.product(cases, DTYPES)
        if is_preparable(case, dtype)
        for form in forms_of(case, dtype)
    ]


def taken(plan: native_weights.Plan) -> str:
    return "gate first" if plan.gate_first else plan.form.name if plan.exchanged is None else "exchanged"


@torch.no_grad()
def by_prepared_weights(inputs: Inputs, case: Case, form: str | None) -> Tensor:
    weights = PreparedWeights(inputs.weight_gwc, inputs.weight_pwc, inputs.weight_redundant, case.geometry)
    y = onepass.forward(inputs.x, weights, inputs.bias, inputs.branch_bias)[0]
    assert form in (None, *map(taken, weights._plans.values()))
    return y


def judged(
    inputs: Inputs, case: Case, form: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """By prepared weights, which must be in ``form``, by the reference in the dtype of ``inputs``, and in float64."""

    @torch.no_grad()
    def by_reference(inputs: Inputs) -> Tensor:
        return reference.spconv2d(*inputs.positional(), branch_bias=inputs.branch_bias, **inputs.window)

    same_dtype, exact = by_reference(inputs), by_reference(inputs.to(torch.float64))
    return {"y": by_prepared_weights(inputs, case, form)}, {"y": same_dtype}, {"y": exact}


CASES = (*SMALL, replace(BY_NAME["plain"], name="k1", kernel_size=(1, 1), padding=(0, 0)))


def test_which_layers_are_preparable() -> None:
    refused = {case.name for case in CASES for dtype in DTYPES if not is_preparable(case, dtype)}
    assert refused == {"wide-padding", "stride-3-shifted"}, "oneDNN reads what it should not, for both weights"


@pytest.mark.parametrize(("case", "form", "dtype"), in_every_form(CASES), ids=str)
def test_prepared_weights_agree_with_float64(
    case: Case, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(form, monkeypatch)
    for options in ({"bias": False}, {}, {"branch_bias": True}, {"memory_format": torch.contiguous_format}):
        # Of single draws, one in ten thousand has a reference too lucky for any other order of summation.
        assert_within_budget_over_draws(judged(make_inputs(case, dtype, **options), case, form) for _ in range(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_prepared_weights_agree_on_the_layers_of_resnet50(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, batch=2)
    got, same_dtype, exact = judged(make_inputs(case, dtype), case)
    assert_within_budget("y", got["y"], same_dtype["y"], exact["y"])


@pytest.mark.parametrize("options", [{"mean": 30.0}, {"mean": 100.0}, {"gate": -30.0}, {"gate": 30.0}], ids=str)
@pytest.mark.parametrize(
    ("case", "form", "dtype"),
    in_every_form(BY_NAME[name] for name in ("plain", "one-group", "stride-2-odd", "alpha-1/16")),
    ids=str,
)
def test_prepared_weights_agree_over_many_draws(
    case: Case, form: str, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(form, monkeypatch)
    assert_within_budget_over_draws(judged(make_inputs(case, dtype, **options), case, form) for _ in range(20))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "stride-2", "stride-2-odd", "alpha-1"])
def test_samples_may_go_one_by_one(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large maps do."""
    monkeypatch.setattr(parts, "CACHED", 1)
    case = replace(BY_NAME[name], batch=5)
    assert_within_budget_over_draws(judged(make_inputs(case, dtype, branch_bias=True), case) for _ in range(3))


def test_weights_are_packed_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """For another shape oneDNN may want another order, and would reorder them in every call."""
    packed, kept = [], native_weights._packed

    def counted(weight: Tensor, x: tuple[int, ...], *window: Any) -> Tensor:
        packed.append(tuple(x))
        return kept(weight, x, *window)

    monkeypatch.setattr(native_weights, "_packed", counted)
    layer = SPConv2d(32, 16, 3, padding=1).eval()
    judge = copy.deepcopy(layer).double()
    shapes = [(batch, 32, height, 6) for batch in (1, 2) for height in range(1, native_weights.PLANS)]
    with torch.no_grad():
        for shape in shapes:
            x = torch.randn(shape)
            for _ in range(2):
                torch.testing.assert_close(layer(x), judge(x.double()).float(), atol=1e-5, rtol=1e-4)
    assert [x[::2] for x in packed] == [x[::2] for x in shapes]  # pixels may be of longer rows
    memory = layer._inference._kept
    assert memory is not None
    assert list(memory.weights._plans) == shapes[-native_weights.PLANS :], "the latest are remembered"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_default_dtype_of_a_call_changes_nothing(dtype: torch.dtype) -> None:
    """Neither of it nor of those that follow: 289 pixels are no number of bfloat16."""
    layer, x = SPConv2d(16, 8, 3, padding=1).eval(), torch.randn(2, 16, 17, 17) + 1
    torch.nn.init.normal_(layer.weight_gwc)
    with torch.no_grad():
        expected = copy.deepcopy(layer)(x)
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(layer(x), expected)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 7])
@torch.no_grad()
def test_any_share_of_the_samples_may_go_together(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(replace(BY_NAME["plain"], batch=7), torch.float32)
    layer, expected = functional.spconv2d_inference, reference.spconv2d(*inputs.positional(), **inputs.window)
    together, by_prepared_weights = [], onepass._by_prepared_weights

    def counted(x: Tensor, *arguments: Any, **plan: Any) -> Any:
        together.append(x.shape[0])
        return by_prepared_weights(x, *arguments, **plan)

    monkeypatch.setattr(parts, "CACHED", samples * (inputs.x[0].nbytes + expected[0].nbytes))
    monkeypatch.setattr(onepass, "_by_prepared_weights", counted)
    monkeypatch.setattr(onepass, "for_one_call", native_weights.prepare)
    torch.testing.assert_close(layer(*inputs.positional(), **inputs.window, backend="native"), expected)
    assert max(together) <= samples
    assert sum(together) == 7
    assert len(together) == -(-7 // max(together)), "as few parts as that allows"
