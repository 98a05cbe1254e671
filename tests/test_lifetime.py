"""What a layer does over a long life: inference mode, weights that change between calls, thousands of calls."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spconv_triton import SPConv2d
from spconv_triton.fused import FusedSPConv2d

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def inference(layer: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        layer(x)


def training_step(layer: nn.Module, x: Tensor) -> None:
    layer(x).sum().backward()


def swapped_weights(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.data = parameter.clone()
    inference(layer, x)


def sizes_of_their_own(layer: nn.Module, x: Tensor) -> None:
    height, width = (int(torch.randint(3, size + 1, ())) for size in x.shape[2:])
    inference(layer, x[:, :, :height, :width])


@pytest.mark.parametrize(
    ("call", "calls"),
    [(inference, 5_000), (training_step, 500), (swapped_weights, 500), (sizes_of_their_own, 500)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_thousands_of_calls_do_not_grow(call: Callable[[nn.Module, Tensor], None], calls: int) -> None:
    """In some of four rounds by less than a hundred bytes a call, which is less than any tensor that stayed alive."""
    layer, x = SPConv2d(8, 8, 3, padding=1), torch.randn(1, 8, 6, 6)
    each = calls // 5
    for _ in range(each):
        call(layer, x)
    sizes = [resident()]
    for _ in range(4):
        for _ in range(each):
            call(layer, x)
        sizes.append(resident())
    assert min(after - before for before, after in itertools.pairwise(sizes)) <= 100 * each, sizes


def test_no_tensor_outlives_its_call() -> None:
    layer, x = SPConv2d(8, 8, 3, padding=1, branch_norm=True), torch.randn(2, 8, 6, 6, requires_grad=True)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    for _ in range(2):
        layer(x).sum().backward()
    before = tensors()
    for _ in range(5):
        layer(x).sum().backward()
    assert tensors() == before


@torch.no_grad()
@pytest.mark.parametrize("branch_norm", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_weights_are_not_held_behind_what_moves_them(branch_norm: bool, fused: bool) -> None:
    layer: Any = SPConv2d(64, 64, 3, padding=1, branch_norm=branch_norm).eval()
    if fused:
        layer = FusedSPConv2d(layer)
    for move in (nn.Module.double, lambda layer: layer.to("meta")):
        layer(torch.randn(1, 64, 6, 6))
        prepared = weakref.ref(layer._inference._kept.weights)
        move(layer)
        assert prepared() is None
        assert fused or layer._folded_norms._kept is None
        layer = layer.to_empty(device="cpu").float()


@torch.no_grad()
def test_prepared_weights_go_with_the_weights() -> None:
    layer = SPConv2d(16, 8, 3, padding=1, bias=False).eval()
    layer(torch.randn(1, 16, 6, 6))
    prepared = weakref.ref(layer._inference._kept.weights)
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(parameter.double()))
    layer(torch.randn(1, 16, 6, 6, dtype=torch.float64))
    assert prepared() is None


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_inference_mode(backend: str) -> None:
    """Its tensors may become weights and inputs, and what it returns is the same as elsewhere."""
    layer, x = SPConv2d(16, 8, 3, padding=1, backend=backend), torch.randn(2, 16, 7, 5)
    expected = layer(x).detach()
    with torch.inference_mode():
        y = layer(x)
        assert y.is_inference()
        assert torch.equal(y, expected)
        made_inside = SPConv2d(16, 8, 3, padding=1, backend=backend)
        made_inside.load_state_dict(layer.state_dict())
        assert torch.equal(made_inside(x.clone()), expected)
    with torch.no_grad():
        assert torch.equal(made_inside(x), expected)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        made_inside(x.requires_grad_())


def test_weights_swapped_in_place_between_calls() -> None:
    """Each way of exchanging weights is seen by the next call, in training and in inference mode."""
    one, other = (SPConv2d(16, 8, 3, padding=1) for _ in range(2))
    x = torch.randn(2, 16, 7, 5)
    results = [layer(x).detach() for layer in (one, other)]
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))

    def by_copy() -> None:
        with torch.no_grad():
            for a, b in pairs:
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)

    def by_data() -> None:
        for a, b in pairs:
            a.data, b.data = b.data, a.data

    def by_swap_tensors() -> None:
        for a, b in pairs:
            torch.utils.swap_tensors(a, b)

    for swap in (by_copy, by_data, by_swap_tensors):
        swap()
        results.reverse()
        for layer, expected in zip((one, other), results, strict=True):
            assert torch.equal(layer(x), expected), swap.__name__
            with torch.inference_mode():
                assert torch.equal(layer(x), expected), swap.__name__
