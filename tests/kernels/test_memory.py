"""What the layer keeps for its backward, and that nothing of the size of an output is among it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case, kept_bytes, make_inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spconv_triton import SPConv2d, functional


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "limit"), [(14, 1.05), (7, 1.25)])
def test_kept_for_backward(size: int, limit: float, dtype: torch.dtype, device: str) -> None:
    case = Case("memory", 2, 32, 32, (size, size))
    inputs = make_inputs(case, dtype, device=device)
    kept = kept_bytes(lambda: functional.spconv2d(*inputs.positional(), **inputs.window, backend="triton"))
    weights = [inputs.weight_gwc, inputs.weight_pwc, inputs.weight_redundant]
    of_x = inputs.x.numel() * inputs.x.itemsize
    allowed = limit * of_x + sum(w.numel() * w.itemsize for w in weights)
    assert of_x < kept <= allowed


def keeps_nothing(layer: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return checkpoint(layer, *tensors, use_reentrant=False)


def keeps_nothing_reentrant(layer: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return checkpoint(layer, *tensors, use_reentrant=True)


def keeps_on_the_host(layer: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return layer(*tensors)


def gated(device: str, *, branch_bias: bool) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    inputs = make_inputs(Case("kept", 2, 8, 8, (5, 5)), device=device, branch_bias=branch_bias)
    tensors = inputs.tensors()

    def layer(*values: Tensor) -> Tensor:
        return functional.spconv2d(**dict(zip(tensors, values, strict=True)), **inputs.window, backend="triton")

    return layer, tuple(tensors.values())


def module(device: str, **options: Any) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    layer = SPConv2d(8, 8, 3, padding=1, backend="triton", device=device, **options)
    return lambda x, *_: layer(x), (torch.randn(2, 8, 5, 5, device=device, requires_grad=True), *layer.parameters())


def fusion(device: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    u3, u1 = (torch.randn(2, 4, 3, 5, device=device, requires_grad=True) for _ in range(2))
    return lambda *branches: functional.gap_softmax_fusion(*branches, backend="triton"), (u3, u1)


OPERATORS: dict[str, Callable[[str], tuple[Callable[..., Tensor], tuple[Tensor, ...]]]] = {
    "layer": partial(gated, branch_bias=False),
    "branch-bias": partial(gated, branch_bias=True),
    "branch-norm": partial(module, branch_norm=True),
    "branch": partial(module, alpha=1.0),
    "fusion": fusion,
}


@pytest.mark.drawn(
    8,
    ("name", "keeping"),
    itertools.product(OPERATORS, (keeps_nothing, keeps_nothing_reentrant, keeps_on_the_host)),
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_kept_may_be_computed_again_or_lie_elsewhere(
    name: str, keeping: Callable[..., Tensor], device: str
) -> None:
    """A backward asks once for what was kept: whoever computes it again then throws it away."""
    function, tensors = OPERATORS[name](device)
    plain = function(*tensors)
    grad = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, tensors, grad)
    y = keeping(function, *tensors)
    assert torch.equal(y, plain)
    y.backward(grad)
    for tensor, gradient in zip(tensors, expected, strict=True):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, gradient)
