"""Prepared weights, and what a layer remembers from one inference to the next; tests/test_weight_updates.py shows that
it follows every change of its weights."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from cases import (
    RESNET50,
    SMALL,
    Case,
    Inputs,
    assert_within_budget,
    assert_within_budget_over_draws,
    make_inputs,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from spconv_triton import (
    SPConv2d,
    functional,
    fuse,
    native_folding,
    native_onepass,
    native_parts,
    native_products,
    native_weights,
    reference,
)
from spconv_triton.geometry import Geometry
from spconv_triton.native_convolution import MULTIPLIES_BFLOAT16
from spconv_triton.native_weights import AVAILABLE, PreparedWeights, are_preparable
from spconv_triton.watch import SAMPLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this PyTorch has no oneDNN")

BY_NAME = {case.name: case for case in SMALL}
DTYPES = (torch.float32, torch.bfloat16) if MULTIPLIES_BFLOAT16 else (torch.float32,)


FORMS = ("merged", "folded", "exchanged", "prepared", "gate first")


def force(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have weights prepared in this form wherever it is right."""
    kept = native_folding.can_fold
    monkeypatch.setattr(native_folding, "MERGED_CHANNELS", 1 << 30 if form == "merged" else 0)
    monkeypatch.setattr(native_weights, "can_fold", lambda *layer: form in ("folded", "exchanged") and kept(*layer))
    if form == "exchanged":
        monkeypatch.setattr(native_products, "ONEDNN_IS_WIDER", True)
        monkeypatch.setattr(native_products, "LARGE_PRODUCT", 0)
        monkeypatch.setattr(native_weights, "EXCHANGED_CHANNELS", 1)
    if form == "gate first":
        monkeypatch.setattr(native_weights, "GATED_BYTES", 0)
        monkeypatch.setattr(native_weights, "GATED_PIXELS", 0)


def geometry_of(case: Case) -> Geometry:
    return Geometry(case.kernel_size, case.stride, case.padding, case.dilation, case.groups)


@torch.no_grad()
def by_prepared_weights(inputs: Inputs, case: Case) -> Tensor:
    weights = PreparedWeights(inputs.weight_gwc, inputs.weight_pwc, inputs.weight_redundant, geometry_of(case))
    return native_onepass.forward(inputs.x, weights, inputs.bias, inputs.branch_bias)[0]


def judged(inputs: Inputs, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """By prepared weights, by the reference in the dtype of ``inputs``, and in float64."""

    @torch.no_grad()
    def by_reference(inputs: Inputs) -> Tensor:
        return reference.spconv2d(*inputs.positional(), branch_bias=inputs.branch_bias, **inputs.window)

    same_dtype, exact = by_reference(inputs), by_reference(inputs.to(torch.float64))
    return {"y": by_prepared_weights(inputs, case)}, {"y": same_dtype}, {"y": exact}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case", [*SMALL, replace(BY_NAME["plain"], name="k1", kernel_size=(1, 1), padding=(0, 0))], ids=str
)
def test_prepared_weights_agree_with_float64(
    case: Case, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(form, monkeypatch)
    inputs = make_inputs(case, dtype)
    if not are_preparable(inputs.x, inputs.weight_gwc, geometry_of(case)):
        assert case.name in ("wide-padding", "stride-3-shifted"), "oneDNN reads what it should not, for both weights"
        return
    for options in ({"bias": False}, {}, {"branch_bias": True}, {"memory_format": torch.contiguous_format}):
        # Of single draws, one in ten thousand has a reference too lucky for any other order of summation.
        assert_within_budget_over_draws(judged(make_inputs(case, dtype, **options), case) for _ in range(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_prepared_weights_agree_on_the_layers_of_resnet50(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, batch=2)
    got, same_dtype, exact = judged(make_inputs(case, dtype), case)
    assert_within_budget("y", got["y"], same_dtype["y"], exact["y"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"mean": 30.0}, {"mean": 100.0}, {"gate": -30.0}, {"gate": 30.0}], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["plain", "one-group", "stride-2-odd", "alpha-1/16"])
def test_prepared_weights_agree_over_many_draws(
    name: str, form: str, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(form, monkeypatch)
    case = BY_NAME[name]
    assert_within_budget_over_draws(judged(make_inputs(case, dtype, **options), case) for _ in range(20))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "stride-2", "stride-2-odd", "alpha-1"])
def test_samples_may_go_one_by_one(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large maps do."""
    monkeypatch.setattr(native_parts, "CACHED", 1)
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


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 7])
@torch.no_grad()
def test_any_share_of_the_samples_may_go_together(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(replace(BY_NAME["plain"], batch=7), torch.float32)
    layer, expected = functional.spconv2d_inference, reference.spconv2d(*inputs.positional(), **inputs.window)
    together, by_prepared_weights = [], native_onepass._by_prepared_weights

    def counted(x: Tensor, *arguments: Any, **plan: Any) -> Any:
        together.append(x.shape[0])
        return by_prepared_weights(x, *arguments, **plan)

    monkeypatch.setattr(native_parts, "CACHED", samples * (inputs.x[0].nbytes + expected[0].nbytes))
    monkeypatch.setattr(native_onepass, "_by_prepared_weights", counted)
    monkeypatch.setattr(native_onepass, "for_one_call", native_weights.prepare)
    torch.testing.assert_close(layer(*inputs.positional(), **inputs.window, backend="native"), expected)
    assert max(together) <= samples
    assert sum(together) == 7
    assert len(together) == -(-7 // max(together)), "as few parts as that allows"


def make(channels: int = 8, *, bias: bool = True) -> tuple[SPConv2d, Tensor]:
    return SPConv2d(channels, channels, 3, padding=1, bias=bias, backend="native").eval(), torch.randn(
        2, channels, 6, 5
    )


def prepared(layer: torch.nn.Module) -> PreparedWeights | None:
    kept = layer._inference._kept
    return None if kept is None else kept.weights


@torch.no_grad()
def infer(layer: SPConv2d, x: Tensor, times: int = 3) -> Tensor:
    for _ in range(times):
        y = layer(x)
    return y


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
    with mock.patch.object(torch, "get_float32_matmul_precision", return_value="medium"):
        infer(layer, x, 1)
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


def make_normed() -> tuple[SPConv2d, Tensor]:
    layer = SPConv2d(8, 8, 3, padding=1, branch_norm=True, backend="native")
    for norm in (layer.norm_representative, layer.norm_redundant):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            torch.nn.init.normal_(tensor)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    return layer.eval(), torch.randn(2, 8, 6, 5)


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


def test_folded_norms_under_vmap() -> None:
    layers = [make_normed()[0] for _ in range(3)]
    x = torch.randn(2, 8, 6, 5)
    parameters, buffers = torch.func.stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = torch.func.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(parameters, buffers)
            torch.testing.assert_close(y, torch.stack([layer(x) for layer in layers]))


def test_fake_tensors_are_not_kept() -> None:
    layer, x = make_normed()
    expected = infer(copy.deepcopy(layer), x)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            layer(torch.empty(x.shape))
        torch.testing.assert_close(layer(x), expected)
