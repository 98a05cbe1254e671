"""Converting a network: what is swapped, what a layer keeps of its convolution, what stays and why, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from spconv_triton import SPConv2d, convert, fuse
from spconv_triton.conversion import Conversion
from spconv_triton.dense import split_weights
from spconv_triton.geometry import Geometry


class Block(nn.Module):
    """A stem that reads an image, two 3 x 3 convolutions, a 1 x 1 one, and a head that is no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1))
        self.narrow = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.narrow(self.body(self.stem(x))).mean((2, 3)))


def report_of(model: nn.Module, *args: Any, **kwargs: Any) -> Conversion:
    reports: list[Conversion] = []
    convert(model, *args, **kwargs, report=reports.append)
    (report,) = reports
    return report


def reasons(report: Conversion) -> dict[str, str]:
    return {decision.names[0]: decision.reason for decision in report.kept}


def swapped(report: Conversion) -> list[str]:
    return [decision.names[0] for decision in report.swapped]


def snapshot(model: nn.Module) -> list[tuple[str, int, str]]:
    """Which objects a network is made of, and how they print."""
    modules = [(name, id(module), repr(module)) for name, module in model.named_modules(remove_duplicate=False)]
    return modules + [(name, id(p), str(p._version)) for name, p in model.named_parameters(remove_duplicate=False)]


def test_a_network() -> None:
    model = Block()
    head, stem = model.head, model.stem
    assert convert(model) is model
    assert [name for name, m in model.named_modules() if isinstance(m, SPConv2d)] == ["body.0", "body.2"]
    assert model.head is head
    assert model.stem is stem
    assert model(torch.randn(2, 3, 9, 7)).shape == (2, 4)


def test_a_convolution_itself() -> None:
    conv = nn.Conv2d(16, 8, 3)
    layer = convert(conv)
    assert isinstance(layer, SPConv2d)
    assert type(conv) is nn.Conv2d
    stem = nn.Conv2d(3, 8, 3)
    assert convert(stem) is stem
    assert str(report_of(stem)).splitlines()[-1] == "  the model has 3 input channels, fewer than min_channels=8"


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "no-bias": {"kernel_size": 3, "padding": 1, "bias": False},
    "stride": {"kernel_size": 3, "stride": (2, 1), "padding": (0, 1)},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "same": {"kernel_size": (5, 3), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": 5, "padding": "valid"},
    "1x3": {"kernel_size": (1, 3), "padding": (0, 1)},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": 5, "padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_output_size_and_dtype_stay(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(16, 12, **options).double()
    layer = convert(copy.deepcopy(conv))
    x = torch.randn(2, 16, 11, 10, dtype=torch.float64).to(memory_format=torch.channels_last)
    y, expected = layer(x), conv(x)
    assert y.shape == expected.shape
    assert y.dtype == torch.float64
    for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode", "in_channels", "out_channels"):
        assert getattr(layer, name) == getattr(conv, name), name


@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_is_that_of_the_convolution(padding_mode: str, stride: int) -> None:
    """With all channels representative, one group and dense weights the layer is the convolution itself."""
    conv = nn.Conv2d(8, 6, 3, stride=stride, padding=1, padding_mode=padding_mode).double()
    layer = convert(conv, alpha=1.0, groups=1, init="dense")
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_device_dtype_mode_and_memory_format_stay(dtype: torch.dtype) -> None:
    for device in ("cpu", "meta"):
        model = Block().to(device, dtype).to(memory_format=torch.channels_last)
        model.body[0].eval()
        convert(model)
        first, second = model.body[0], model.body[2]
        assert not first.training
        assert second.training
        for layer in (first, second):
            for name, p in layer.named_parameters():
                assert (p.dtype, p.device.type) == (dtype, device), name
            assert layer.weight_pwc.is_contiguous(memory_format=torch.channels_last)
            assert (
                layer.weight_redundant.stride() == layer.weight_redundant.to(memory_format=torch.channels_last).stride()
            )


def test_the_bias_is_the_same_parameter() -> None:
    model = Block()
    model.body[0].bias.requires_grad_(False)
    bias = model.body[0].bias
    for p in model.body[2].parameters():
        p.requires_grad_(False)
    convert(model)
    assert model.body[0].bias is bias
    assert not bias.requires_grad
    assert [name for name, p in model.body[2].named_parameters() if not p.requires_grad] == ["bias"]


def test_hooks_and_attributes_move() -> None:
    conv = nn.Conv2d(16, 8, 3, padding=1)
    conv.index = 7
    calls: list[str] = []
    handles = [
        conv.register_forward_pre_hook(lambda *_: calls.append("pre")),
        conv.register_forward_pre_hook(lambda *_: calls.append("pre-keywords"), with_kwargs=True),
        conv.register_forward_hook(lambda *_: calls.append("hook")),
        conv.register_forward_hook(lambda *_: calls.append("hook-keywords"), with_kwargs=True),
        conv.register_forward_hook(lambda *_: calls.append("always"), always_call=True),
        conv.register_full_backward_pre_hook(lambda *_: calls.append("backward-pre")),
        conv.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    model = convert(nn.Sequential(conv))
    assert model[0].index == 7
    x = torch.randn(1, 16, 5, 5, requires_grad=True)
    model(x).sum().backward()
    assert calls == ["pre", "pre-keywords", "hook", "hook-keywords", "always", "backward-pre", "backward"]
    with pytest.raises(ValueError, match="got 4 channels"):
        model(x[:, :4])
    assert calls[-2:] == ["pre-keywords", "always"]
    for handle in handles:
        handle.remove()
    calls.clear()
    model(x).sum().backward()
    assert calls == []


def test_a_shared_convolution_stays_shared() -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    model = nn.ModuleDict({"a": nn.Sequential(conv, nn.ReLU()), "b": nn.ModuleList([conv]), "c": nn.Conv2d(16, 8, 3)})
    report = report_of(model, {"b.0": 0.25, "*": 0.5})
    assert [decision.names for decision in report.swapped] == [("a.0", "b.0"), ("c",)]
    assert isinstance(model["a"][0], SPConv2d)
    assert model["a"][0] is model["b"][0]
    assert (model["a"][0].alpha, model["c"].alpha) == (0.25, 0.5)


def test_twice_is_once() -> None:
    model = convert(Block())
    before = snapshot(model)
    report = report_of(model, exclude="body.0")
    assert snapshot(model) == before
    assert reasons(report)["body.2"] == "is an SPConv2d already"


class Stacked(nn.Sequential):
    """A Sequential whose own constructor knows its parts."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.out_channels = 8


def test_a_subclass_of_sequential() -> None:
    model = convert(Stacked())
    assert isinstance(model, Stacked)
    assert isinstance(model[0], SPConv2d)
    assert model(torch.randn(2, 8, 5, 5)).shape == (2, 8, 5, 5)


def test_data_parallel_and_a_traced_graph() -> None:
    model = convert(nn.DataParallel(Block()))
    assert isinstance(model.module.body[0], SPConv2d)
    graph = torch.fx.symbolic_trace(Block())
    convert(graph)
    assert isinstance(graph.get_submodule("body.0"), SPConv2d)
    assert graph(torch.randn(1, 3, 6, 6)).shape == (1, 4)


def test_layers_are_calls_in_a_traced_graph() -> None:
    """As nn.Conv2d's are, fused ones too."""
    converted = convert(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())).eval()
    x = torch.randn(2, 16, 7, 7)
    for model in (converted, fuse(converted)):
        graph = torch.fx.symbolic_trace(model)
        assert next(node for node in graph.graph.nodes if node.op == "call_module").target == "0"
        with torch.no_grad():
            torch.testing.assert_close(graph(x), model(x))


def test_options_reach_the_layers() -> None:
    model = convert(Block(), 0.25, 4, branch_norm=True, backend="reference")
    for layer in (model.body[0], model.body[2]):
        assert (layer.alpha, layer.groups, layer.branch_norm, layer.backend) == (0.25, 4, True, "reference")


# What stays, and why.


class Odd(nn.Conv2d):
    pass


def parametrized() -> nn.Module:
    conv = nn.Conv2d(16, 16, 3)
    parametrizations.weight_norm(conv)
    return conv


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Conv2d(16, 16, 3), "weight", 0.5)


def with_own(name: str, value: Any) -> nn.Module:
    conv = nn.Conv2d(16, 16, 3)
    setattr(conv, name, value)
    return conv


def with_state_hook() -> nn.Module:
    conv = nn.Conv2d(16, 16, 3)
    conv.register_load_state_dict_post_hook(lambda *_: None)
    return conv


def with_float8() -> nn.Module:
    conv = nn.Conv2d(16, 16, 3, bias=False)
    conv.weight = nn.Parameter(conv.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return conv


class Labelled(nn.Parameter):
    """A parameter that is more than its numbers."""


def with_subclass() -> nn.Module:
    conv = nn.Conv2d(16, 16, 3)
    conv.weight = Labelled(conv.weight.detach())
    return conv


def with_computed_bias() -> nn.Module:
    return parametrize.register_parametrization(nn.Conv2d(16, 16, 3), "bias", nn.Tanh())


def with_plain_bias() -> nn.Module:
    conv = nn.Conv2d(16, 16, 3)
    del conv.bias
    conv.bias = torch.zeros(16)
    return conv


STAY: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "1x1": (lambda: nn.Conv2d(16, 16, 1), {}, "is 1 x 1"),
    "even": (lambda: nn.Conv2d(16, 16, (3, 4)), {}, "has an even kernel_size, (3, 4), without a centre"),
    "grouped": (lambda: nn.Conv2d(16, 16, 3, groups=4), {}, "is grouped (groups=4)"),
    "depthwise": (lambda: nn.Conv2d(16, 32, 3, groups=16), {}, "is depthwise (groups=16)"),
    "image": (lambda: nn.Conv2d(7, 16, 3), {}, "has 7 input channels, fewer than min_channels=8"),
    "min_channels": (
        lambda: nn.Conv2d(16, 16, 3),
        {"min_channels": 17},
        "has 16 input channels, fewer than min_channels=17",
    ),
    "few": (
        lambda: nn.Conv2d(8, 16, 3),
        {"groups": 8},
        "has 8 input channels, too few to split with groups=8",
    ),
    "fewer": (
        lambda: nn.Conv2d(8, 16, 3),
        {"groups": 16, "alpha": 1},
        "has 8 input channels, too few to split with groups=16",
    ),
    "outputs": (lambda: nn.Conv2d(16, 9, 3), {}, "has 9 output channels, no multiple of groups=2"),
    "transposed": (lambda: nn.ConvTranspose2d(16, 16, 3), {}, "is a transposed convolution"),
    "1d": (lambda: nn.Conv1d(16, 16, 3), {}, "is a Conv1d, not a convolution of images"),
    "3d": (lambda: nn.Conv3d(16, 16, 3), {}, "is a Conv3d, not a convolution of images"),
    "subclass": (lambda: Odd(16, 16, 3), {}, "is a Odd, a subclass of nn.Conv2d that may compute something else"),
    "lazy": (lambda: nn.LazyConv2d(16, 3), {}, "has no shape before its first input (lazy)"),
    "parametrized": (
        parametrized,
        {},
        "has computed weights (a parametrization, pruning or a weight norm) or parameters of its own",
    ),
    "pruned": (
        pruned,
        {},
        "has computed weights (a parametrization, pruning or a weight norm) or parameters of its own",
    ),
    "computed-bias": (
        with_computed_bias,
        {},
        "has computed weights (a parametrization, pruning or a weight norm) or parameters of its own",
    ),
    "plain-bias": (
        with_plain_bias,
        {},
        "has computed weights (a parametrization, pruning or a weight norm) or parameters of its own",
    ),
    "one-number": (lambda: nn.Conv2d(16, 16, 3, padding=(1,)), {}, "has a padding of 1 numbers, (1,)"),
    "parameter": (
        lambda: with_own("scale", nn.Parameter(torch.ones(1))),
        {},
        "has computed weights (a parametrization, pruning or a weight norm) or parameters of its own",
    ),
    "buffer": (
        lambda: with_own("mask", nn.Buffer(torch.ones(1))),
        {},
        "has buffers or modules of its own",
    ),
    "module": (lambda: with_own("act", nn.ReLU()), {}, "has buffers or modules of its own"),
    "forward": (lambda: with_own("forward", lambda x: x), {}, "has a forward of its own"),
    "state-hook": (
        with_state_hook,
        {},
        "has hooks on its state dict, which may know its parameters by name",
    ),
    "float8": (with_float8, {}, "has weights of torch.float8_e4m3fn"),
    "parameter-subclass": (with_subclass, {}, "has parameters of type Labelled"),
    "spconv": (lambda: SPConv2d(16, 16, 3), {}, "is an SPConv2d already"),
}


@pytest.mark.parametrize(("make", "options", "reason"), STAY.values(), ids=STAY)
def test_what_stays(make: Callable[[], nn.Module], options: dict[str, Any], reason: str) -> None:
    conv = make()
    model = nn.ModuleList([conv, nn.Conv2d(32, 32, 3)])
    report = report_of(model, **options)
    assert model[0] is conv
    assert reasons(report) == {"0": reason}
    assert swapped(report) == ["1"]
    assert f"  0 {reason}" in str(report).splitlines()


def test_numpy_s_ints_are_ints() -> None:
    sizes = {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2}
    conv = nn.Conv2d(np.int64(16), np.int64(16), **{name: np.int64(size) for name, size in sizes.items()})
    (layer,) = convert(nn.Sequential(conv))
    assert isinstance(layer, SPConv2d)
    assert {type(value) for name in ("in_channels", "out_channels") for value in [getattr(layer, name)]} == {int}
    x = torch.randn(1, 16, 9, 9)
    assert layer(x).shape == conv(x).shape


def test_shared_weights_stay() -> None:
    first, second = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
    second.weight = first.weight
    model = nn.ModuleDict({"a": first, "b": nn.Sequential(second), "c": nn.Conv2d(16, 16, 3)})
    model["c"].bias = first.bias
    report = report_of(model)
    assert reasons(report) == dict.fromkeys(("a", "b.0"), "shares its weight: a.weight, b.0.weight")
    assert model["c"].bias is first.bias  # a bias plays the same part in both
    tied_to_the_network = nn.Sequential(nn.Conv2d(16, 16, 3))
    tied_to_the_network.register_parameter("kernel", tied_to_the_network[0].weight)
    assert reasons(report_of(tied_to_the_network)) == {"0": "shares its weight: kernel, 0.weight"}


# Which are asked for.


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("layer1", "layer2", "layer10"):
            self.add_module(name, nn.Sequential(nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3)))


@pytest.mark.parametrize(
    ("options", "alphas"),
    [
        ({"alpha": 0.25}, {"layer1.0": 8, "layer1.2": 8, "layer2.0": 8, "layer2.2": 8, "layer10.0": 8, "layer10.2": 8}),
        ({"include": "layer1.*"}, {"layer1.0": 16, "layer1.2": 16}),
        ({"include": ["layer1.*", "*.2"]}, {"layer1.0": 16, "layer1.2": 16, "layer2.2": 16, "layer10.2": 16}),
        ({"exclude": ("layer1*", "*.0")}, {"layer2.2": 16}),
        ({"include": "layer1*", "exclude": "layer10.*"}, {"layer1.0": 16, "layer1.2": 16}),
        ({"alpha": {"layer1.*": 0.25, "*.2": 1}}, {"layer1.0": 8, "layer1.2": 8, "layer2.2": 32, "layer10.2": 32}),
        ({"alpha": {"layer[12].0": 0.1, "*": 0.5}, "exclude": "*.2"}, {"layer1.0": 2, "layer2.0": 2, "layer10.0": 16}),
    ],
    ids=str,
)
def test_patterns(options: dict[str, Any], alphas: dict[str, int]) -> None:
    model = Deep()
    report = report_of(model, **options)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SPConv2d)}
    assert {name: layer.representative_channels for name, layer in layers.items()} == alphas
    assert {d.names[0]: d.representative_channels for d in report.swapped} == alphas


def test_reasons_of_patterns() -> None:
    unmatched = "matches no pattern of alpha"
    expected = {"stem": unmatched, "body.2": unmatched, "narrow": "is 1 x 1"}
    assert reasons(report_of(Block(), {"body.0": 0.5})) == expected
    assert reasons(report_of(Block(), include="body.0"))["body.2"] == "is not included"
    assert reasons(report_of(Block(), exclude=["*.2"]))["body.2"] == "is excluded by '*.2'"


def test_rounding_is_reported() -> None:
    model = nn.Sequential(nn.Conv2d(44, 16, 3), nn.Conv2d(16, 16, 3))
    report = report_of(model, 0.3, groups=4)
    assert [(d.wanted_alpha, d.representative_channels, d.is_rounded) for d in report.swapped] == [
        (0.3, 12, True),  # int(44 * 0.3) = 13
        (0.3, 4, False),
    ]
    assert [layer.representative_channels for layer in model] == [12, 4]
    assert str(report) == (
        "2 of 2 convolutions become SPConv2d\n"
        "  0 alpha 0.2727 (rounded from 0.3): 12 of 44 channels\n"
        "  1 alpha 0.3: 4 of 16 channels"
    )


# What is refused.


def compiled() -> nn.Module:
    return torch.compile(Block(), backend="eager")


def compiled_inside() -> nn.Module:
    model = Block()
    model.body.compile(backend="eager")
    return model


def scripted() -> nn.Module:
    model = Block()
    model.body = torch.jit.trace(model.body, torch.randn(1, 16, 5, 5))
    return model


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "model": ({"model": [nn.Conv2d(8, 8, 3)]}, TypeError, "model must be a torch.nn.Module, got list"),
    "alpha-0": ({"alpha": 0}, ValueError, "alpha must be in (0, 1], got 0"),
    "alpha-nan": ({"alpha": float("nan")}, ValueError, "alpha must be in (0, 1], got nan"),
    "alpha-word": ({"alpha": "half"}, TypeError, "alpha must be a number, got 'half'"),
    "alpha-bool": ({"alpha": True}, TypeError, "alpha must be a number, got True"),
    "alpha-none": ({"alpha": None}, TypeError, "alpha must be a number, got None"),
    "mapping-empty": ({"alpha": {}}, ValueError, "alpha must be a number or a mapping with at least one pattern"),
    "mapping-2": ({"alpha": {"body.*": 2}}, ValueError, "alpha['body.*'] must be in (0, 1], got 2"),
    "mapping-none": ({"alpha": {"body.*": None}}, TypeError, "alpha['body.*'] must be a number, got None"),
    "mapping-key": ({"alpha": {1: 0.5}}, TypeError, "alpha must map patterns, which are strings, to numbers, got the"),
    "mapping-typo": (
        {"alpha": {"boddy.*": 0.5, "*": 0.25}},
        ValueError,
        "alpha must have patterns that match convolutions, got 'boddy.*', which matches none of the model's 4 "
        "('stem', 'body.0', 'body.2', 'narrow')",
    ),
    "mapping-order": (
        {"alpha": {"*": 0.5, "body.*": 0.25}},
        ValueError,
        "alpha must have the special patterns before the general ones, got 'body.*' behind patterns that take all",
    ),
    "include-typo": ({"include": ["body.*", "Stem"]}, ValueError, "include must have patterns that match convolutions"),
    "include-linear": ({"include": "head"}, ValueError, "got 'head', which matches none of the model's 4"),
    "include-empty": ({"include": []}, ValueError, "include must be None or at least one pattern, got []"),
    "include-int": ({"include": 3}, TypeError, "include must be a pattern or several, got 3"),
    "include-ints": ({"include": [3]}, TypeError, "include must be patterns, which are strings, got 3"),
    "exclude-typo": ({"exclude": "body"}, ValueError, "exclude must have patterns that match convolutions, got 'body'"),
    "no-convolution": (
        {"model": nn.Linear(3, 3), "include": "*"},
        ValueError,
        "got '*', which matches none of the model's 0 (none)",
    ),
    "groups-0": ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
    "groups-float": ({"groups": 2.0}, TypeError, "groups must be an int, got 2.0"),
    "groups-bool": ({"groups": True}, TypeError, "groups must be an int, got True"),
    "min_channels": ({"min_channels": 0}, ValueError, "min_channels must be at least 1, got 0"),
    "min_channels-none": ({"min_channels": None}, TypeError, "min_channels must be an int, got None"),
    "branch_norm": ({"branch_norm": "yes"}, TypeError, "branch_norm must be True or False, got 'yes'"),
    "init": ({"init": "zeros"}, ValueError, "init must be one of 'default', 'dense', got 'zeros'"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'triton', 'native', 'reference', got"),
    "report": ({"report": "yes"}, TypeError, "report must be callable or None, got 'yes'"),
    "compiled": (
        {"model": compiled},
        ValueError,
        "model must not be compiled yet, but it is; use torch.compile(convert(model))",
    ),
    "compiled-inside": ({"model": compiled_inside}, ValueError, "model must not be compiled yet, but its body is"),
    "scripted": ({"model": scripted}, ValueError, "model must not be scripted yet, but its body is; convert first"),
}


@pytest.mark.parametrize(("wrong", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_arguments_change_nothing(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    model = wrong.get("model", Block())
    model = model() if not isinstance(model, (nn.Module, list)) else model
    before = snapshot(model) if isinstance(model, nn.Module) else []
    with pytest.raises(error) as caught:
        convert(**{**wrong, "model": model})
    assert message in str(caught.value)
    assert not isinstance(model, nn.Module) or snapshot(model) == before


def test_ddp_is_refused(tmp_path) -> None:
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Block())
        with pytest.raises(ValueError, match="wrapped in DistributedDataParallel yet, but it is; convert first"):
            convert(model)
        assert type(model.module.body[0]) is nn.Conv2d
        wrapped = nn.parallel.DistributedDataParallel(convert(Block()))
        wrapped(torch.randn(2, 3, 6, 6)).sum().backward()
        assert all(p.grad is not None for p in wrapped.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_an_error_halfway_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Block()
    before = snapshot(model)
    make, made = SPConv2d.from_conv2d, []

    def second_fails(conv: nn.Conv2d, *args: Any, **kwargs: Any) -> SPConv2d:
        if made:
            raise torch.OutOfMemoryError("no memory")
        made.append(conv)
        return make(conv, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SPConv2d, "from_conv2d", second_fails)
        with pytest.raises(torch.OutOfMemoryError):
            convert(model)
    assert made
    assert snapshot(model) == before

    def veto(_report: Conversion) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        convert(model, report=veto)
    assert snapshot(model) == before


# Weights from the dense ones.


def test_default_weights_are_drawn() -> None:
    torch.manual_seed(0)
    drawn = convert(nn.Conv2d(16, 16, 3))
    assert drawn.weight_pwc.std() > 0.03
    torch.manual_seed(1)
    state = torch.get_rng_state()
    convert(nn.Conv2d(16, 16, 3, device="meta"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_dense_weights_are_least_squares(stride, dilation, correlation) -> None:
    """Against a solver that knows only the assumed covariance of the pixels under a window."""
    M, L, representative, G, k = 6, 10, 4, 2, (5, 3)
    weight = torch.randn(M, L, *k, dtype=torch.float64)
    geometry = Geometry(k, stride, (0, 0), dilation, G)
    got = split_weights(weight, representative, geometry, correlation)

    # Every pixel that a window or its mean sees, as (row, column) from the centre tap.
    taps = [((i - 2) * dilation[0], (j - 1) * dilation[1]) for i in range(k[0]) for j in range(k[1])]
    window = [(i, j) for i in range(stride[0]) for j in range(stride[1])]
    pixels = sorted({*taps, *window})
    covariance = torch.tensor(
        [[correlation ** (abs(a[0] - b[0]) + abs(a[1] - b[1])) for b in pixels] for a in pixels], dtype=torch.float64
    )
    root = torch.linalg.cholesky(covariance)
    mean = torch.tensor([float(p in window) / len(window) for p in pixels], dtype=torch.float64)
    for m in range(M):
        for channel in range(L):
            dense = torch.zeros(len(pixels), dtype=torch.float64)
            for value, tap in zip(weight[m, channel].flatten(), taps, strict=True):
                dense[pixels.index(tap)] = value
            best = 2 * torch.linalg.lstsq((root.T @ mean)[:, None], (root.T @ dense)[:, None]).solution.item()
            if channel >= representative:
                assert got.redundant[m, channel - representative].item() == pytest.approx(best, abs=1e-10)
            elif channel // (representative // G) == m // (M // G):
                torch.testing.assert_close(got.gwc[m, channel % (representative // G)], 2 * weight[m, channel])
                assert got.pwc[m, channel].item() == 0
            else:
                assert got.pwc[m, channel].item() == pytest.approx(best, abs=1e-10)


def test_dense_weights_in_low_precision_and_on_meta() -> None:
    conv = nn.Conv2d(16, 8, 3, dtype=torch.bfloat16)
    layer = convert(conv, init="dense")
    exact = split_weights(conv.weight.double(), 8, layer.geometry)
    for name, weight in exact._asdict().items():
        error = (getattr(layer, f"weight_{name}").double() - weight).abs().max() / weight.abs().max()
        assert error <= torch.finfo(torch.bfloat16).eps
    assert convert(nn.Conv2d(16, 8, 3, device="meta"), init="dense").weight_gwc.is_meta


def smooth(*shape: int) -> torch.Tensor:
    """Random maps, non-negative and smooth as those behind a ReLU are."""
    x = nn.functional.interpolate(torch.randn(*shape[:2], shape[2] // 4, shape[3] // 4), shape[2:], mode="bicubic")
    return x.relu()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("alpha", [0.5, 0.25, 1.0])
def test_a_dense_start_is_closer_to_the_convolution(stride: int, alpha: float) -> None:
    conv = nn.Conv2d(32, 32, 3, stride=stride, padding=1)
    x = smooth(4, 32, 24, 24)
    with torch.no_grad():
        y = conv(x)
        error = {
            init: ((convert(copy.deepcopy(conv), alpha, init=init)(x) - y).norm() / y.norm()).item()
            for init in ("default", "dense")
        }
    assert error["dense"] < 0.75 < error["default"]


def test_attributes_of_the_layer_are_its_own() -> None:
    conv = nn.Conv2d(16, 8, 3)
    conv.alpha, conv.backend = 3, "its own"
    (made,) = convert(nn.Sequential(conv))
    assert (made.alpha, made.backend) == (0.5, "auto")


@pytest.mark.parametrize(
    "register",
    [
        "register_state_dict_pre_hook",
        "register_state_dict_post_hook",
        "register_load_state_dict_pre_hook",
        "register_load_state_dict_post_hook",
    ],
)
def test_every_hook_on_a_state_dict_keeps_it(register: str) -> None:
    conv = nn.Conv2d(16, 16, 3)
    getattr(conv, register)(lambda *_: None)
    assert reasons(report_of(nn.ModuleList([conv])))["0"].startswith("has hooks on its state dict")


def test_exclusion_is_told_first() -> None:
    model = nn.ModuleDict({"a": nn.Conv2d(16, 16, 3), "b": nn.Conv2d(16, 16, 3)})
    assert reasons(report_of(model, include="a", exclude="b"))["b"] == "is excluded by 'b'"
