"""What a layer remembers from one inference to the next; tests/test_weight_updates.py shows that it follows every
change of its weights."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inference_cases import DTYPES, infer, make, make_normed, prepared
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from spconv_triton import SPConv2d, functional, fuse
from spconv_triton.native.weights import AVAILABLE
from spconv_triton.watch import SAMPLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this PyTorch has no oneDNN")


@pytest.mark.parametrize("channels", [8, 64])
@pytest.mark.parametrize("size", [(3, 2), (9, 10)])
def test_every_call_gives_the_same_bits(channels: int, size: tuple[int, int]) -> None:
    layer, _ = make(channels)
    x = torch.randn(3, channels, *size)
    first = infer(layer, x, 1)
    assert torch.equal(first, infer(layer, x))
    assert torch.equal(first, infer(copy.deepcopy(layer), x, 1))


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of calls that were not recalled."""
    found = []
    original = functional._spconv2d

    def counted(arguments: Any, *rest: Any) -> Tensor:
        found.append(arguments[0])
        return original(arguments, *rest)

    monkeypatch.setattr(functional, "_spconv2d", counted)
    return found


def test_a_call_that_fitted_is_recalled(looked_at: list[Tensor]) -> None:
    layer, x = make()
    y = infer(layer, x)
    assert len(looked_at) == 1
    other = torch.randn(1, 8, 12, 7)
    layout = torch.channels_last
    for again in (other, other.contiguous(memory_format=layout), x.contiguous(memory_format=layout)):
        looked_at.clear()
        expected = infer(copy.deepcopy(layer), again, 1)
        assert torch.equal(infer(layer, again), expected)
        assert infer(layer, again).stride() == expected.stride()
        assert len(looked_at) == 2, "one of the layer's, one of its copy"
    assert torch.equal(infer(layer, x), y)


def test_weights_that_cannot_be_remembered_are_not_prepared() -> None:
    with torch.inference_mode():
        layer, x = make()
        assert torch.equal(infer(layer, x), infer(layer, x))
    assert prepared(layer) is None
    layer, x = make()
    with torch.autocast("cpu", torch.bfloat16):
        infer(layer, x)
    assert prepared(layer) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_can_be_remembered_are_prepared(dtype: torch.dtype, looked_at: list[Tensor]) -> None:
    layer, x = make()
    y = infer(layer.to(dtype), x.to(dtype))
    assert y.dtype == dtype
    assert prepared(layer) is not None
    assert len(looked_at) == 1


@pytest.mark.parametrize(("batch", "channels", "size"), [(2, 64, 8), (9, 64, 64)], ids=["whole", "in parts"])
def test_the_default_device_is_not_that_of_the_layer(batch: int, channels: int, size: int) -> None:
    """What is made on the way, and remembered, is where the input is."""
    layer = SPConv2d(channels, channels, 3, padding=1).eval()
    x = torch.randn(batch, channels, size, size)
    with torch.no_grad():
        with torch.device("meta"):
            first = layer(x)
        assert torch.equal(layer(x), first)
        judge = functional.spconv2d(
            x, layer.weight_gwc, layer.weight_pwc, layer.weight_redundant, layer.bias, padding=1, backend="reference"
        )
    torch.testing.assert_close(first, judge, rtol=1e-4, atol=1e-4)


def test_windows_of_lists_and_missing_weights_are_left_to_the_checks() -> None:
    layer, x = make()
    y = infer(layer, x)
    layer.stride = [1, 1]
    assert torch.equal(infer(layer, x), y)
    del layer._parameters["weight_pwc"]
    layer.weight_pwc = "no tensor"
    with pytest.raises(TypeError, match=r"weight_pwc must be a torch\.Tensor"):
        infer(layer, x)


def test_modes_of_calls_may_mix() -> None:
    layer, x = make(64)
    with torch.inference_mode():
        y = layer(x)
    layer.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    again = layer(x)
    assert torch.equal(again, y)
    assert not again.is_inference()
    assert torch.equal(
        layer(x.requires_grad_()).detach(),
        functional.spconv2d(
            x, layer.weight_gwc, layer.weight_pwc, layer.weight_redundant, layer.bias, padding=1
        ).detach(),
    )


CHANGES: dict[str, Callable[[SPConv2d], Any]] = {
    "padding": lambda layer: setattr(layer, "padding", (0, 0)),
    "stride": lambda layer: setattr(layer, "stride", (2, 2)),
    "backend": lambda layer: setattr(layer, "backend", "reference"),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "bias": lambda layer: layer.bias.data.fill_(7),
    "infinite bias": lambda layer: layer.bias.data.fill_(float("inf")),
    "weights of float64": lambda layer: layer.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_layer_is_looked_at_again(change: Callable[[SPConv2d], Any]) -> None:
    layer, x = make()
    infer(layer, x)
    change(layer)
    x = x.to(layer.weight_gwc.dtype)
    assert torch.equal(infer(layer, x), infer(copy.deepcopy(layer), x, 1))


def test_a_call_that_does_not_fit_is_refused_after_one_that_did() -> None:
    layer, x = make()
    infer(layer, x)
    for wrong, error in ((x[0], ValueError), (x[:, :7], ValueError), (x.double(), TypeError), (x.tolist(), TypeError)):
        with pytest.raises(error):
            infer(layer, wrong)
    layer.bias.data = torch.zeros(3)
    with pytest.raises(ValueError, match="bias must be"):
        infer(layer, x)


def test_what_looks_on_sees_every_operation(looked_at: list[Tensor]) -> None:
    layer, x = make()
    y = infer(layer, x)
    looked_at.clear()
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        torch.func.vmap(layer)(x[None])
        with torch.backends.mkldnn.flags(enabled=False):
            torch.testing.assert_close(layer(x), y)
    assert counter.get_total_flops() == 2 * sum(w.numel() for w in layer.parameters() if w.dim() == 4) * 2 * 30
    assert len(looked_at) == 4
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        infer(layer, x, 1)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(looked_at) == 5


def test_a_fused_layer_recalls_by_all_that_it_is_called_with() -> None:
    network = torch.nn.Sequential(
        SPConv2d(8, 8, 3, padding=1, backend="native"), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    )
    network[1].running_var.uniform_(0.5, 2)
    fused = fuse(network.eval())[0]
    x, residual = torch.randn(2, 8, 6, 5), torch.randn(2, 8, 6, 5)
    with torch.no_grad():
        for _ in range(3):
            plain, added = fused(x), fused(x, residual)
        torch.testing.assert_close(plain, network(x))
        torch.testing.assert_close(added, torch.relu(network[:2](x) + residual))
        fused.activation = "none"
        torch.testing.assert_close(fused(x), network[:2](x))
        with pytest.raises(ValueError, match="x must have 8 channels"):
            fused(x[:, :7])


def test_is_kept_until_the_layer_trains() -> None:
    layer, x = make()
    infer(layer, x)
    first = prepared(layer)
    assert first is not None
    infer(layer, x)
    assert prepared(layer) is first
    layer.train()(x).sum().backward()
    assert prepared(layer) is None


def test_gradients_never_see_it() -> None:
    layer, x = make()
    infer(layer, x)
    layer(x).sum().backward()
    expected = copy.deepcopy(layer)
    expected.zero_grad()
    expected(x).sum().backward()
    assert torch.equal(layer.weight_gwc.grad, expected.weight_gwc.grad)


@pytest.mark.parametrize("name", ["weight_gwc", "weight_pwc", "weight_redundant"])
@pytest.mark.parametrize("part", ["output", "input"])
def test_a_changed_channel_is_seen_past_the_version(name: str, part: str) -> None:
    """Of weights that are too large to be compared as a whole."""
    layer, x = make(256)
    weight = getattr(layer, name)
    assert weight.numel() > SAMPLE
    before = infer(layer, x)
    (weight.data[7] if part == "output" else weight.data[:, 7]).neg_()
    after = infer(layer, x, 1)
    assert not torch.equal(before[:, 7], after[:, 7])
    assert torch.equal(after, infer(copy.deepcopy(layer), x))


@pytest.mark.parametrize("element", [0, 17, 143])
def test_any_changed_element_of_a_small_weight_is_seen_past_its_version(element: int) -> None:
    layer, x = make()
    assert layer.weight_gwc.numel() <= SAMPLE
    before = infer(layer, x)
    weight = layer.weight_gwc.data
    weight.as_strided((weight.numel(),), (1,))[element] += 1
    assert not torch.equal(before, infer(layer, x, 1))


def test_weights_that_are_new_in_every_call_are_not_prepared() -> None:
    layer, x = make()
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_gwc")
    infer(layer, x)
    assert prepared(layer) is None


def test_copies_and_pickles_keep_nothing() -> None:
    layer, x = make()
    y = infer(layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._inference is not layer._inference
        assert prepared(other) is None
        assert torch.equal(infer(other, x), y)
    assert "_inference" not in "".join(layer.state_dict())


def test_nothing_outlives_the_layer() -> None:
    layer, x = make()
    infer(layer, x)
    memory = weakref.ref(layer._inference)
    weight = weakref.ref(layer.weight_gwc)
    del layer
    gc.collect()
    assert memory() is None
    assert weight() is None


def test_weights_that_have_no_version_are_not_prepared() -> None:
    with torch.inference_mode():
        layer, x = make()
        assert layer.weight_gwc.is_inference()
        y = infer(layer, x)
        layer.weight_gwc.neg_()
        assert not torch.equal(y, infer(layer, x))
    assert prepared(layer) is None


def test_weights_with_gaps_in_their_memory_are_compared_as_a_whole() -> None:
    layer, x = make()
    layer.weight_gwc.data = torch.randn(8, 2, 3, 6)[..., ::2]
    before = infer(layer, x)
    assert prepared(layer) is not None
    layer.weight_gwc.data[3, 1, 2, 0] += 1
    assert not torch.equal(before, infer(layer, x, 1))


@pytest.mark.parametrize("name", ["weight_gwc", "weight_pwc", "weight_redundant"])
def test_one_changed_element_of_a_large_weight_is_seen(name: str) -> None:
    layer, x = make(64)
    weight = getattr(layer, name)
    before = infer(layer, x)
    with torch.no_grad():
        weight.as_strided((weight.numel(),), (1,))[1] += 1
    after = infer(layer, x, 1)
    assert not torch.equal(before, after)
    assert torch.equal(after, infer(copy.deepcopy(layer), x))


def test_another_view_of_the_same_memory_is_seen() -> None:
    layer, x = SPConv2d(16, 8, 3, padding=1, backend="native").eval(), torch.randn(2, 16, 6, 5)
    before = infer(layer, x)
    layer.weight_pwc.data = layer.weight_pwc.data.transpose(0, 1)
    after = infer(layer, x, 1)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, infer(copy.deepcopy(layer), x))


def test_a_bias_of_another_dtype_is_refused() -> None:
    layer, x = make(8)
    infer(layer, x)
    layer.bias.data = torch.zeros(8, dtype=torch.float64)
    with pytest.raises(TypeError, match="bias must have the dtype"):
        infer(layer, x)


def test_empty_batches_before_and_after_others() -> None:
    layer, x = make(8)
    for order in ((x[:0], x), (x, x[:0])):
        mine = copy.deepcopy(layer)
        for part in order:
            assert infer(mine, part).shape == part.shape
    fused = fuse(torch.nn.Sequential(layer, torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval())
    assert infer(fused, x[:0]).shape == (0, 8, 6, 5)


def test_nothing_is_prepared_without_onednn() -> None:
    layer, x = make(8)
    with torch.backends.mkldnn.flags(enabled=False):
        infer(layer, x)
    assert prepared(layer) is None


def test_fake_tensors_are_not_kept() -> None:
    layer, x = make_normed()
    expected = infer(copy.deepcopy(layer), x)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            layer(torch.empty(x.shape))
        torch.testing.assert_close(layer(x), expected)
