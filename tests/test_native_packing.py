"""The weight that a layer keeps packed from one inference to the next; tests/test_weight_updates.py shows that it
follows every change."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor

from spconv_triton import SPConv2d, fuse
from spconv_triton.native_packing import AVAILABLE, SAMPLE, Packing

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this PyTorch has no oneDNN")


def make(channels: int = 8, *, bias: bool = True) -> tuple[SPConv2d, Tensor]:
    return SPConv2d(channels, channels, 3, padding=1, bias=bias, backend="native").eval(), torch.randn(
        2, channels, 6, 5
    )


def packed(layer: SPConv2d) -> Tensor | None:
    kept = layer._packing._kept
    return None if kept is None else kept.packed


@torch.no_grad()
def infer(layer: SPConv2d, x: Tensor, times: int = 3) -> Tensor:
    for _ in range(times):
        y = layer(x)
    return y


@pytest.mark.parametrize("channels", [8, 64])
@pytest.mark.parametrize("size", [(3, 2), (9, 10)])
def test_packed_or_not_the_results_are_the_same_bits(channels: int, size: tuple[int, int]) -> None:
    layer, _ = make(channels)
    x = torch.randn(3, channels, *size)
    first = infer(layer, x, 1)
    assert packed(layer) is None
    again = infer(layer, x)
    assert packed(layer) is not None
    assert torch.equal(first, again)
    other = torch.randn(1, channels, 12, 7)
    assert torch.equal(infer(copy.deepcopy(layer), other, 1), infer(layer, other, 1))


def test_is_kept_until_the_layer_trains() -> None:
    layer, x = make()
    infer(layer, x)
    first = packed(layer)
    assert first is not None
    infer(layer, x)
    assert packed(layer) is first
    layer.train()(x).sum().backward()
    assert packed(layer) is None


def test_gradients_never_see_it() -> None:
    layer, x = make()
    infer(layer, x)
    layer(x).sum().backward()
    expected = copy.deepcopy(layer)
    expected.zero_grad()
    expected(x).sum().backward()
    assert torch.equal(layer.weight_gwc.grad, expected.weight_gwc.grad)


def test_a_changed_weight_of_many_is_seen_past_its_version() -> None:
    """One filter of a weight too large to be compared as a whole."""
    layer, x = make(256)
    assert layer.weight_gwc.numel() > SAMPLE
    before = infer(layer, x)
    layer.weight_gwc.data[7].neg_()
    after = infer(layer, x, 1)
    assert not torch.equal(before[:, 7], after[:, 7])
    assert torch.equal(after, infer(layer, x))


@pytest.mark.parametrize("element", [0, 17, 143])
def test_any_changed_element_of_a_small_weight_is_seen_past_its_version(element: int) -> None:
    layer, x = make()
    assert layer.weight_gwc.numel() <= SAMPLE
    before = infer(layer, x)
    weight = layer.weight_gwc.data
    weight.as_strided((weight.numel(),), (1,))[element] += 1
    assert not torch.equal(before, infer(layer, x, 1))


def test_weights_that_are_new_in_every_call_are_not_packed() -> None:
    layer, x = make()
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_gwc")
    infer(layer, x)
    assert packed(layer) is None
    normed = SPConv2d(8, 8, 3, padding=1, branch_norm=True, backend="native").eval()
    infer(normed, x)
    assert normed._packing._kept is None
    fused = fuse(torch.nn.Sequential(normed).eval())
    infer(fused, x)
    assert packed(fused[0]) is not None


def test_copies_and_pickles_keep_nothing() -> None:
    layer, x = make()
    y = infer(layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._packing is not layer._packing
        assert other._packing._kept is None
        assert torch.equal(infer(other, x), y)
    assert "_packing" not in "".join(layer.state_dict())


def test_nothing_outlives_the_layer() -> None:
    layer, x = make()
    infer(layer, x)
    memory = weakref.ref(layer._packing)
    weight = weakref.ref(layer.weight_gwc)
    del layer
    gc.collect()
    assert memory() is None
    assert weight() is None


def test_weights_that_have_no_version_are_not_packed() -> None:
    with torch.inference_mode():
        layer, x = make()
        assert layer.weight_gwc.is_inference()
        y = infer(layer, x)
        layer.weight_gwc.neg_()
        assert not torch.equal(y, infer(layer, x))
    assert packed(layer) is None


def test_another_window_packs_anew() -> None:
    packing, weight = Packing(), torch.randn(8, 4, 3, 3)
    x = torch.randn(1, 8, 9, 7).contiguous(memory_format=torch.channels_last)
    for window in (((1, 1), (1, 1), (1, 1), 2), ((2, 1), (0, 1), (1, 2), 2)):
        assert packing.convolve(x, weight, None, *window) is None
        expected = torch.nn.functional.conv2d(x, weight, None, *window)
        for _ in range(2):
            torch.testing.assert_close(packing.convolve(x, weight, None, *window), expected)
