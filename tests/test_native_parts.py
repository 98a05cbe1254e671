"""A batch that goes through the layer in parts on ATen: what it computes, and how many samples go together."""

from __future__ import annotations

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch
from cases import (
    BY_NAME,
    GATED,
    Case,
    assert_agrees,
    assert_agrees_over_draws,
    make_inputs,
    native,
    output_grad,
    run,
)

from spconv_triton import reference
from spconv_triton.native import backward as native_backward
from spconv_triton.native import backward_products, folding, onepass
from spconv_triton.native import parts as native_parts


@pytest.mark.drawn(
    54, ("case", "backward", "samples"), itertools.product(GATED, ("maps", "products", "merged"), (1, 2)), ids=str
)
def test_agrees_in_parts(case: Case, backward: str, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many samples at a time, and at the end those that are left."""
    monkeypatch.setattr(folding, "MERGED_CHANNELS", 1 << 30 if backward == "merged" else 0)
    monkeypatch.setattr(folding, "FEW_PRODUCTS", float("inf"))
    monkeypatch.setattr(backward_products, "pay", lambda given: backward == "products")
    for module in (onepass, native_backward):
        monkeypatch.setattr(module, "samples_together", lambda x, outputs, size: samples)
    case = replace(case, batch=3)
    for options in ({"bias": False}, {"branch_bias": True}, {"memory_format": torch.contiguous_format}):
        assert_agrees(native, make_inputs(case, torch.float64, **options))
        assert_agrees_over_draws(native, lambda options=options: make_inputs(case, **options), 3)


@pytest.mark.parametrize("frozen", ["weight_gwc", "weight_pwc", "weight_redundant", "bias", "x"])
def test_parts_with_some_gradients_only(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_parts, "CACHED", 1)
    inputs = make_inputs(BY_NAME["stride-2"], torch.float64)
    inputs = replace(inputs, **{frozen: inputs.tensors()[frozen].detach()})
    wanted = [t for t in inputs.tensors().values() if t.requires_grad]
    found, expected = (
        torch.autograd.grad(layer(*inputs.positional(), **inputs.window).square().sum(), wanted)
        for layer in (native, reference.spconv2d)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_how_many_samples_go_together(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fit, forward and backward; in half precision all of them."""
    inputs = make_inputs(replace(BY_NAME["plain"], batch=5, size=(4, 4)), dtype)  # else the gate comes first
    y = run(reference.spconv2d, inputs)["y"]
    of_two = (inputs.x[:2].numel() + y[:2].numel()) * 4
    monkeypatch.setattr(native_parts, "CACHED", of_two)
    forward = mock.Mock(side_effect=onepass._by_branches)
    backward = mock.Mock(side_effect=native_backward._of_part)
    monkeypatch.setattr(onepass, "_by_branches", forward)
    monkeypatch.setattr(native_backward, "_of_part", backward)
    run(native, inputs, output_grad(inputs))
    parts = [2, 2, 1] if dtype == torch.float32 else [5]
    assert [len(call.args[0]) for call in forward.call_args_list] == parts
    assert [len(call.args[0][0]) for call in backward.call_args_list] == parts
