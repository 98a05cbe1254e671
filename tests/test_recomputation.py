"""``spconv_triton.set_recompute``: what a layer on ATen keeps for the backward, and that it computes the same."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from cases import (
    BY_NAME,
    GATED,
    RESNET50,
    SMALL,
    Case,
    assert_agrees,
    assert_agrees_over_draws,
    kept_beside_parameters,
    kept_bytes,
    make_inputs,
    native,
    output_grad,
    run,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from spconv_triton import SPConv2d, set_recompute
from spconv_triton.native import backward, backward_products, folding, onepass, parts, weights
from spconv_triton.recomputation import recomputes


@pytest.fixture
def keeping() -> Iterator[None]:
    with set_recompute(False):
        yield


@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_agrees_with_the_reference(case: Case, dtype: torch.dtype) -> None:
    for options in ({"bias": False}, {"branch_bias": True}, {"memory_format": torch.contiguous_format}):
        assert_agrees_over_draws(native, functools.partial(make_inputs, case, dtype, **options), 4)


@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_agrees_on_the_layers_of_resnet50(case: Case, dtype: torch.dtype) -> None:
    assert_agrees_over_draws(native, lambda: make_inputs(replace(case, batch=2), dtype), 2)


@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", GATED, ids=str)
def test_agrees_under_large_means_and_saturated_gates(case: Case, dtype: torch.dtype) -> None:
    for options in ({"mean": 100.0}, *({"gate": gate} for gate in (-30.0, -8.0, 8.0, 30.0))):
        assert_agrees_over_draws(native, functools.partial(make_inputs, case, dtype, **options), 4, perturbations=4)


@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("form", ["given", "folded", "merged"])
@pytest.mark.parametrize("case", GATED, ids=str)
def test_agrees_in_parts_and_every_form(case: Case, form: str, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights in each of their forms, so many samples at a time."""
    monkeypatch.setattr(folding, "MERGED_CHANNELS", 1 << 30 if form == "merged" else 0)
    monkeypatch.setattr(folding, "FEW_PRODUCTS", float("inf"))
    monkeypatch.setattr(folding, "FOLDED_PRODUCTS", -1 if form == "folded" else float("inf"))
    monkeypatch.setattr(weights, "GATED_BYTES", 0)  # then the gate of prepared weights would come first
    monkeypatch.setattr(weights, "GATED_PIXELS", 0)
    for module in (onepass, backward):
        monkeypatch.setattr(module, "samples_together", lambda x, outputs, size: samples)
    monkeypatch.setattr(parts, "CACHED", 1 if samples == 1 else 1 << 30)
    case = replace(case, batch=3)
    assert_agrees(native, make_inputs(case, torch.float64, branch_bias=True))
    assert_agrees_over_draws(native, lambda: make_inputs(case), 3)


@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize("name", ["plain", "stride-2"])
def test_a_large_bias_leaves_no_rounding_in_what_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded weights may take a bias into both branches."""
    monkeypatch.setattr(folding, "FOLDED_PRODUCTS", -1)

    def draw():
        inputs = make_inputs(BY_NAME[name])
        return replace(inputs, bias=(inputs.bias.detach() + 1e4).requires_grad_())

    assert_agrees_over_draws(native, draw, 4)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", ["plain", "stride-2"])
def test_no_branch_is_computed_again(name: str, merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as maps nor as weight gradients of single samples, though they would pay; where the gate would come
    first there is nothing to keep, so it does not."""
    monkeypatch.setattr(folding, "MERGED_CHANNELS", 1 << 30 if merged else 0)
    inputs = make_inputs(BY_NAME[name])
    grad, wanted = output_grad(inputs), [t for t in inputs.tensors().values() if t.requires_grad]
    expected = torch.autograd.grad(native(*inputs.positional(), **inputs.window), wanted, grad)
    again = mock.Mock(side_effect=AssertionError("computed again"))
    monkeypatch.setattr(backward_products, "pay", lambda given: True)
    monkeypatch.setattr(backward_products, "gate_gradient", again)
    monkeypatch.setattr(weights, "gate_comes_first", lambda x, geometry: True)
    with set_recompute(False):
        y = native(*inputs.positional(), **inputs.window)
    monkeypatch.setattr(torch.nn.functional, "conv2d", again)
    torch.testing.assert_close(torch.autograd.grad(y, wanted, grad), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_keeps_one_map_of_the_outputs_size(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, bias=False)
    recomputing = kept_beside_parameters(native, inputs)
    with set_recompute(False):
        keeping = kept_beside_parameters(native, inputs)
    y = run(native, inputs)["y"]
    assert keeping - recomputing == y.numel() * y.itemsize


@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize("merged", [False, True])
def test_another_backward_finds_what_was_kept(merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "MERGED_CHANNELS", 1 << 30 if merged else 0)
    inputs = make_inputs(BY_NAME["plain"])
    y = native(*inputs.positional(), **inputs.window)
    grad, wanted = output_grad(inputs), [t for t in inputs.tensors().values() if t.requires_grad]
    first, second = (torch.autograd.grad(y, wanted, grad, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.usefixtures("keeping")
def test_second_derivatives() -> None:
    inputs = make_inputs(BY_NAME["plain"], torch.float64)
    tensors = inputs.tensors()

    def layer(*values: Tensor) -> Tensor:
        return native(*replace(inputs, **dict(zip(tensors, values, strict=True))).positional(), **inputs.window)

    torch.autograd.gradgradcheck(layer, tuple(tensors.values()), fast_mode=True)


@pytest.mark.usefixtures("keeping")
def test_compiled_graphs_are_the_compilers() -> None:
    """What they keep is not for this to say, and nothing is compiled again for it."""
    torch.compiler.reset()
    layer = SPConv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    graphs = CompileCounter()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    kept = kept_bytes(lambda: compiled(x))
    with set_recompute(True):
        assert kept_bytes(lambda: compiled(x)) == kept
    assert graphs.frame_count == 1


def test_counts_from_the_forward_on() -> None:
    """The backward may come later, and in another mode."""
    layer, x = SPConv2d(8, 8, 3, padding=1), torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    x.requires_grad_()
    with set_recompute(False):
        inside = layer(x)
    outside = layer(x)
    keeps = [sum(t is not None and t.shape == inside.shape for t in y.grad_fn.saved_tensors) for y in (inside, outside)]
    assert keeps == [2, 1]  # x has the shape of y
    with set_recompute(False):
        of_outside = torch.autograd.grad(outside.sum(), x)
    torch.testing.assert_close(torch.autograd.grad(inside.sum(), x), of_outside)


def test_is_for_all_threads_until_it_ends() -> None:
    assert recomputes()
    with set_recompute(False):
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(recomputes()))
        thread.start()
        thread.join()
        assert seen == [False]
        with set_recompute(True):
            assert recomputes()
        assert not recomputes()
    assert recomputes()
    with pytest.raises(KeyError), set_recompute(False):
        raise KeyError
    assert recomputes()
    set_recompute(False)
    assert not recomputes()
    set_recompute(True)
    assert recomputes()
