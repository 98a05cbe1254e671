"""Norms of branches that were folded once: kept until they change, and no longer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inference_cases import infer, make_normed, prepared

from spconv_triton import SPConv2d, fuse
from spconv_triton.native.weights import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this PyTorch has no oneDNN")


def test_norms_are_folded_once() -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        layer, x = make_normed()
        with mode():
            y = layer(x)
            first = layer._folded_norms._kept
            assert torch.equal(layer(x), y)
        assert layer._folded_norms._kept is first is not None
        assert prepared(layer) is not None
        torch.testing.assert_close(y, fuse(torch.nn.Sequential(layer).eval())[0](x))
        assert torch.equal(infer(copy.deepcopy(layer), x), y)
        assert copy.deepcopy(layer)._folded_norms._kept is None


NORM_CHANGES: dict[str, Callable[[SPConv2d], Any]] = {
    "weight": lambda layer: layer.norm_representative.weight.data.neg_(),
    "bias": lambda layer: layer.norm_redundant.bias.data.add_(1),
    "mean": lambda layer: layer.norm_redundant.running_mean.add_(1),
    "variance": lambda layer: layer.norm_representative.running_var.mul_(2),
    "eps": lambda layer: setattr(layer.norm_redundant, "eps", 0.5),
    "another norm": lambda layer: setattr(layer, "norm_redundant", torch.nn.BatchNorm2d(8).eval()),
    "weights": lambda layer: layer.weight_pwc.data.neg_(),
    "state dict": lambda layer: layer.load_state_dict(make_normed()[0].state_dict()),
    "step": lambda layer: layer.train()(torch.randn(2, 8, 6, 5)),
}


@pytest.mark.parametrize("change", NORM_CHANGES.values(), ids=NORM_CHANGES)
def test_changed_norms_are_folded_anew(change: Callable[[SPConv2d], Any]) -> None:
    layer, x = make_normed()
    before = infer(layer, x)
    change(layer)
    after = infer(layer.eval(), x, 1)
    assert not torch.equal(before, after)
    assert torch.equal(after, infer(copy.deepcopy(layer), x, 1))


def test_gradients_go_through_norms_that_were_folded() -> None:
    layer, x = make_normed()
    infer(layer, x)
    layer(x).sum().backward()
    assert layer.norm_representative.weight.grad is not None
    assert layer.weight_gwc.grad is not None


def test_folded_norms_under_vmap() -> None:
    layers = [make_normed()[0] for _ in range(3)]
    x = torch.randn(2, 8, 6, 5)
    parameters, buffers = torch.func.stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = torch.func.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(parameters, buffers)
            torch.testing.assert_close(y, torch.stack([layer(x) for layer in layers]))
