"""SPConv2d as a layer: where nn.Conv2d stood, it behaves as nn.Conv2d did."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_within_budget, run
from fresh import run_python
from layer_cases import assert_as_reference, dense, every_dtype, every_format, every_layer, inputs_of, make, state_of
from published import PublishedSPConv
from torch import nn

from spconv_triton import SPConv2d, functional, reference


def test_constructor_is_that_of_conv2d() -> None:
    ours = inspect.signature(SPConv2d).parameters
    theirs = inspect.signature(nn.Conv2d).parameters
    shared = list(ours)[: len(theirs)]
    assert shared == list(theirs)
    differing = {name for name in shared if ours[name].default != theirs[name].default}
    assert differing == {"groups"}
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(ours)[len(theirs) :])


@every_layer
def test_attributes_are_those_of_conv2d(options: dict[str, Any]) -> None:
    layer, conv = make(options), dense(options)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode"):
        assert getattr(layer, name) == getattr(conv, name), name
    assert (layer.bias is None) == (conv.bias is None)
    assert layer.groups == options.get("groups", 2)
    assert layer.alpha == options.get("alpha", 0.5)
    assert layer.branch_norm is options.get("branch_norm", False)
    x = torch.randn(2, 8, 9, 7)
    assert layer(x).shape == conv(x).shape


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"kernel_size": 3},
            {
                "weight_gwc": (12, 2, 3, 3),
                "weight_pwc": (12, 4, 1, 1),
                "weight_redundant": (12, 4, 1, 1),
                "bias": (12,),
            },
        ),
        (
            {"kernel_size": (1, 5), "groups": 3, "alpha": 0.75, "bias": False},
            {"weight_gwc": (12, 2, 1, 5), "weight_pwc": (12, 6, 1, 1), "weight_redundant": (12, 2, 1, 1)},
        ),
        (
            {"kernel_size": 3, "groups": 1, "alpha": 1},
            {"weight_gwc": (12, 8, 3, 3), "weight_pwc": (12, 8, 1, 1), "bias": (12,)},
        ),
    ],
    ids=["defaults", "three-groups", "all"],
)
def test_parameters(options: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    layer = make(options)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == expected
    assert all(p.requires_grad and p.is_leaf for p in layer.parameters())
    absent = {"weight_redundant", "bias"} - expected.keys()
    assert all(getattr(layer, name) is None for name in absent)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kernel_size": 3}, "8, 12, kernel_size=(3, 3), stride=(1, 1), groups=2, alpha=0.5"),
        (
            {"kernel_size": (1, 3), "stride": 2, "padding": (0, 1), "dilation": (1, 2), "bias": False},
            "8, 12, kernel_size=(1, 3), stride=(2, 2), padding=(0, 1), dilation=(1, 2), groups=2, alpha=0.5, "
            "bias=False",
        ),
        (
            {"kernel_size": 3, "padding": "same", "groups": 1, "alpha": 0.25, "padding_mode": "circular"},
            "8, 12, kernel_size=(3, 3), stride=(1, 1), padding='same', groups=1, alpha=0.25, padding_mode='circular'",
        ),
        (
            {"kernel_size": 3, "alpha": 1, "backend": "native"},
            "8, 12, kernel_size=(3, 3), stride=(1, 1), groups=2, alpha=1, backend='native'",
        ),
    ],
    ids=["defaults", "geometry", "modes", "backend"],
)
def test_repr(options: dict[str, Any], expected: str) -> None:
    assert repr(make(options)) == f"SPConv2d({expected})"


def test_repr_with_norms() -> None:
    first = repr(make({"kernel_size": 3}, branch_norm=True)).splitlines()[1]
    assert first == "  8, 12, kernel_size=(3, 3), stride=(1, 1), groups=2, alpha=0.5, branch_norm=True"


@every_layer
def test_copies_are_equal_and_independent(options: dict[str, Any]) -> None:
    layer = make(options).eval()
    x = torch.randn(2, 8, 9, 7)
    expected, state = layer(x), state_of(layer)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(copied) == repr(layer)
        assert not copied.training
        assert torch.equal(copied(x), expected)
        with torch.no_grad():
            for p in copied.parameters():
                p.zero_()
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


@every_layer
def test_state_dict_round_trip(options: dict[str, Any]) -> None:
    layer, other = make(options).eval(), make(options).eval()
    x = torch.randn(2, 8, 9, 7)
    assert not torch.equal(layer(x), other(x))
    assert other.load_state_dict(layer.state_dict(), strict=True) == ([], [])
    assert torch.equal(layer(x), other(x))


def test_checkpoint_loads_in_another_process(tmp_path: Path) -> None:
    layer = make({"kernel_size": 3, "stride": 2, "padding": 1, "branch_norm": True}).eval()
    x = torch.randn(2, 8, 9, 7)
    torch.save({"state": layer.state_dict(), "x": x, "y": layer(x).detach()}, tmp_path / "checkpoint.pt")
    code = """
import torch
from spconv_triton import SPConv2d
saved = torch.load("checkpoint.pt", weights_only=True)
layer = SPConv2d(8, 12, 3, stride=2, padding=1, branch_norm=True).eval()
layer.load_state_dict(saved["state"], strict=True)
print(torch.equal(layer(saved["x"]), saved["y"]))
"""
    assert run_python(code, tmp_path) == "True\n"


@pytest.mark.parametrize(
    "shared",
    [
        {"kernel_size": 3, "padding": "same", "bias": False},
        {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "dtype": torch.float64},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "dtype": torch.bfloat16},
        {"kernel_size": 3, "padding": "valid", "device": "meta"},
    ],
    ids=["same", "geometry", "reflect", "meta"],
)
@pytest.mark.parametrize("training", [False, True])
@every_format
def test_from_conv2d(shared: dict[str, Any], training: bool, memory_format: torch.memory_format) -> None:
    conv = nn.Conv2d(16, 12, **shared).to(memory_format=memory_format).train(training)
    state = {} if conv.weight.is_meta else state_of(conv)
    layer = SPConv2d.from_conv2d(conv, alpha=0.25, branch_norm=True)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode"):
        assert getattr(layer, name) == getattr(conv, name), name
    assert (layer.alpha, layer.groups, layer.branch_norm) == (0.25, 2, True)
    assert all(module.training is training for module in layer.modules())
    for name, p in layer.named_parameters():
        assert (p.dtype, p.device) == (conv.weight.dtype, conv.weight.device), name
    assert layer.weight_gwc.shape[1] > 1, "a weight of one channel is in both formats"
    assert layer.weight_gwc.is_contiguous(memory_format=memory_format)
    assert (layer.bias is None) == (conv.bias is None)
    if layer.bias is not None and not conv.weight.is_meta:
        assert torch.equal(layer.bias, conv.bias)
        assert layer.bias.data_ptr() != conv.bias.data_ptr()
    assert all(torch.equal(conv.state_dict()[name], value) for name, value in state.items())


class StandardisedConv2d(nn.Conv2d):
    """A convolution with a forward of its own."""


@pytest.mark.parametrize(
    ("conv", "error", "parts"),
    [
        (nn.Conv2d(8, 12, 3, groups=2), ValueError, ("conv", "groups=1", "got 2")),
        (nn.Conv2d(8, 12, 2), ValueError, ("kernel_size", "odd", "(2, 2)")),
        (nn.Conv2d(3, 12, 3), ValueError, ("alpha=0.5", "groups=2", "int(3 * 0.5) = 1")),
        (nn.Conv2d(8, 11, 3), ValueError, ("groups", "out_channels=11")),
        (nn.ConvTranspose2d(8, 12, 3), TypeError, ("conv", "nn.Conv2d", "got ConvTranspose2d")),
        (nn.Conv1d(8, 12, 3), TypeError, ("conv", "nn.Conv2d", "got Conv1d")),
        (StandardisedConv2d(8, 12, 3), TypeError, ("conv", "nn.Conv2d", "got StandardisedConv2d")),
        (3, TypeError, ("conv", "nn.Conv2d", "got int")),
    ],
    ids=["grouped", "even", "narrow", "odd-outputs", "transposed", "1d", "subclass", "int"],
)
def test_from_conv2d_refuses(conv: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        SPConv2d.from_conv2d(conv)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@every_format
def test_padding_modes(mode: str, stride: int, memory_format: torch.memory_format) -> None:
    """As explicit padding; zeros are no pixels, though, so that pooling at a stride leaves them out."""
    layer = SPConv2d(8, 12, 3, stride, (2, 1), padding_mode=mode)
    x = torch.randn(2, 8, 6, 7).contiguous(memory_format=memory_format)
    inputs = inputs_of(layer, x)
    if mode != "zeros":
        inputs.x = F.pad(x, (1, 1, 2, 2), mode=mode)
        inputs.window["padding"] = (0, 0)
    elif stride == 1:
        inputs.x = F.pad(x, (1, 1, 2, 2))
        inputs.window["padding"] = (0, 0)
    y = layer(x)
    same_dtype, exact = (run(reference.spconv2d, i)["y"] for i in (inputs, inputs.to(torch.float64)))
    assert_within_budget("y", y, same_dtype, exact)
    assert y.is_contiguous(memory_format=memory_format)
    assert y.shape == nn.Conv2d(8, 12, 3, stride, (2, 1), padding_mode=mode)(x).shape


def published_and_ours(stride: int, ratio: float) -> tuple[PublishedSPConv, SPConv2d]:
    published = PublishedSPConv(16, 12, stride, ratio).double()
    # The norm of its branch cancels this bias; ours has none.
    nn.init.zeros_(published.conv1x1.bias)
    layer = SPConv2d(16, 12, 3, stride, 1, bias=False, alpha=ratio, branch_norm=True, dtype=torch.float64)
    for norm in (published.bn1, published.bn2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    copied = {"gwc.weight": "weight_gwc", "pwc.weight": "weight_pwc", "conv1x1.weight": "weight_redundant"}
    state = {copied.get(name, name): value for name, value in published.state_dict().items() if name != "conv1x1.bias"}
    norms = {"bn1.": "norm_representative.", "bn2.": "norm_redundant."}
    for theirs, ours in norms.items():
        state = {name.replace(theirs, ours): value for name, value in state.items()}
    layer.load_state_dict(state, strict=True)
    return published, layer


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_branch_norm_is_the_published_layer(stride: int, ratio: float) -> None:
    published, layer = published_and_ours(stride, ratio)
    pairs = {
        "gwc": (published.gwc.weight, layer.weight_gwc),
        "pwc": (published.pwc.weight, layer.weight_pwc),
        "redundant": (published.conv1x1.weight, layer.weight_redundant),
        "norm 3": (published.bn1.weight, layer.norm_representative.weight),
        "norm 1": (published.bn2.bias, layer.norm_redundant.bias),
    }
    for _ in range(2):
        x = torch.randn(3, 16, 8, 6, dtype=torch.float64, requires_grad=True)
        expected, got = published(x), layer(x)
        assert_within_budget("train", got, expected, expected)
        grad = torch.randn_like(expected)
        theirs = torch.autograd.grad(expected, [x, *(p for p, _ in pairs.values())], grad)
        ours = torch.autograd.grad(got, [x, *(p for _, p in pairs.values())], grad)
        for name, a, b in zip(["x", *pairs], ours, theirs, strict=True):
            # Batch statistics take two passes more than a convolution, so a few roundings more.
            assert_within_budget(name, a, b, b, factor=8)
    for theirs, ours in ((published.bn1, layer.norm_representative), (published.bn2, layer.norm_redundant)):
        assert ours.num_batches_tracked == theirs.num_batches_tracked == 2
        for name in ("running_mean", "running_var"):
            assert_within_budget(name, getattr(ours, name), getattr(theirs, name), getattr(theirs, name))
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    expected = published.eval()(x)
    assert_within_budget("eval", layer.eval()(x), expected, expected)


@every_layer
@every_format
def test_an_empty_batch(options: dict[str, Any], memory_format: torch.memory_format) -> None:
    """An empty result, and zeros for gradients, as of nn.Conv2d. Eval: a norm has no statistics of nothing."""
    layer, conv = make(options).eval(), dense(options)
    x = torch.empty(0, 8, 9, 7).contiguous(memory_format=memory_format).requires_grad_()
    y, expected = layer(x), conv(x)
    assert y.shape == expected.shape
    y.sum().backward()
    expected.sum().backward()
    assert x.grad.shape == x.shape
    assert conv.weight.grad is not None
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert torch.equal(p.grad, torch.zeros_like(p)), name


@every_dtype
@every_format
def test_dtypes(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    layer = SPConv2d(8, 12, 3, padding=1, dtype=dtype)
    assert_as_reference(layer, torch.randn(2, 8, 9, 7, dtype=dtype).contiguous(memory_format=memory_format))
    assert_as_reference(layer.to(torch.float64), torch.randn(2, 8, 9, 7, dtype=torch.float64))


def test_in_a_sequence_learns() -> None:
    """In place of nn.Conv2d in plain training code: every parameter moves, and the loss falls."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        SPConv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        SPConv2d(12, 12, 3, 2, 1, branch_norm=True),
        nn.Flatten(),
        nn.Linear(12 * 16, 4),
    )
    x, target = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


@every_layer
def test_meta_device(options: dict[str, Any]) -> None:
    """Shapes without data, as for counting operations or building a model before its weights are read."""
    assert (
        make(options, device="meta")(torch.empty(2, 8, 9, 7, device="meta")).shape
        == dense(options)(torch.zeros(2, 8, 9, 7)).shape
    )


@every_layer
def test_autocast(options: dict[str, Any]) -> None:
    """float32 parameters, bfloat16 work; the input may be of either, since any layer may come before."""
    layer = make(options).train()
    for dtype in (torch.float32, torch.bfloat16):
        layer.zero_grad()
        x = torch.randn(2, 8, 9, 7, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16 or layer.branch_norm
        y.float().square().sum().backward()
        assert x.grad.dtype == dtype
        for name, p in layer.named_parameters():
            assert p.grad.dtype == torch.float32, name
            assert p.grad.isfinite().all(), name


def test_autocast_is_the_layer_in_bfloat16() -> None:
    layer = make({"kernel_size": 3, "padding": 1})
    x = torch.randn(2, 8, 9, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    inputs = inputs_of(layer, x).to(torch.bfloat16)
    assert_within_budget(
        "y", y, run(reference.spconv2d, inputs)["y"], run(reference.spconv2d, inputs.to(torch.float64))["y"]
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.double()(x.double()).dtype == torch.float64, "autocast leaves float64 alone, as for nn.Conv2d"


def test_autocast_keeps_the_gate_in_float32() -> None:
    """U3 averages 64.25, which bfloat16 would round to 64, the average of U1: beta must not become 1/2."""
    layer = SPConv2d(4, 2, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight_gwc.zero_()
        layer.weight_pwc.copy_(torch.eye(2)[..., None, None])
        layer.weight_redundant.copy_(torch.eye(2)[..., None, None])
    u3 = torch.tensor([[0.0, 0.0], [128.0, 129.0]]).expand(1, 2, 2, 2)
    u1 = torch.full((1, 2, 2, 2), 64.0)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.cat([u3, u1], dim=1))
    beta = torch.sigmoid(torch.tensor(0.25))
    assert torch.equal(y, (beta * u3 + (1 - beta) * u1).bfloat16())


def test_what_fitted_once_is_no_excuse_for_the_next_call() -> None:
    layer, x = SPConv2d(8, 6, 3, padding=1), torch.randn(2, 8, 5, 4)
    expected = layer(x)
    assert torch.equal(layer(x), expected)
    with pytest.raises(ValueError, match="x must have 8 channels"):
        layer(x[:, :7])
    with pytest.raises(TypeError, match=r"weight_gwc must have the dtype of x, torch\.float64"):
        layer(x.double())
    layer.stride = (2, 1)
    assert layer(x).shape == (2, 6, 3, 4)
    layer.stride = [1, 1]
    assert torch.equal(layer(x), expected)
    layer.dilation = (0, 1)
    with pytest.raises(ValueError, match="dilation must be an int of at least 1, or a pair of them"):
        layer(x)
    layer.dilation = (1, 1)
    layer.bias = nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match="bias must be"):
        layer(x)
    layer.bias = None
    layer.weight_redundant = nn.Parameter(layer.weight_redundant.detach()[:, :3])
    with pytest.raises(ValueError, match="x must have 7 channels"):
        layer(x)
    layer(x[:, :7])


def test_only_so_many_kinds_of_arguments_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "FOUND", 3)
    monkeypatch.setattr(functional, "_found", {})
    layer = SPConv2d(4, 4, 3, padding=1)
    for size in range(1, 9):
        layer(torch.randn(1, 4, size, size))
        assert 0 < len(functional._found) <= 3


def test_window_may_be_assigned_as_that_of_conv2d() -> None:
    """As those do who exchange strides for dilation."""
    ours, theirs = SPConv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    x = torch.randn(2, 8, 9, 10)
    for layer in (ours, theirs):
        layer.padding, layer.dilation = (2, 3), (2, 2)
    assert ours(x).shape == theirs(x).shape
    assert ours.geometry.padding == (2, 3)
    for layer in (ours, theirs):
        layer.stride = (2, 1)
    assert ours.eval()(x).shape == theirs(x).shape
    same = SPConv2d(8, 8, 3, padding="same")
    same.dilation = (3, 2)
    assert same(x).shape == x.shape


def test_is_called_by_the_names_of_conv2d() -> None:
    layer, x = SPConv2d(8, 8, 3, padding=1), torch.randn(2, 8, 5, 5)
    assert torch.equal(layer(input=x), layer(x))


def test_a_single_tap_has_no_dilation() -> None:
    layer = SPConv2d(8, 8, (1, 3), padding="same", dilation=2)
    assert layer.dilation == (2, 2), "as it was given"
    assert layer.geometry.dilation == (1, 2)
    assert layer(torch.randn(1, 8, 5, 6)).shape == (1, 8, 5, 6)
