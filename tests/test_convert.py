"""convert: what is swapped, which layers are asked for, and what a layer keeps of its convolution."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from convert_cases import Block, reasons, report_of, snapshot
from torch import nn

from spconv_triton import SPConv2d, convert, fuse
from spconv_triton.fused import FusedSPConv2d


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


class Twice(SPConv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def plus_one(_: nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (given[0] + 1,)


def tripled(_: nn.Module, __: Any, y: torch.Tensor) -> torch.Tensor:
    return y * 3


def hooked() -> nn.Module:
    layer = SPConv2d(8, 8, 3, padding=1)
    layer.register_forward_pre_hook(plus_one)
    layer.register_forward_hook(tripled)
    return layer


def hooked_and_fused() -> nn.Module:
    layer = FusedSPConv2d(SPConv2d(8, 8, 3, padding=1).eval(), activation="relu")
    layer.register_forward_hook(tripled)
    return layer


@pytest.mark.parametrize("make", [lambda: Twice(8, 8, 3, padding=1), hooked, hooked_and_fused])
def test_hooks_and_derived_classes_count_once_in_a_traced_graph(make: Any) -> None:
    model = nn.Sequential(make(), nn.ReLU()).eval()
    graph, x = torch.fx.symbolic_trace(model), torch.randn(2, 8, 7, 7)
    for traced in (graph, pickle.loads(pickle.dumps(graph))):
        with torch.no_grad():
            torch.testing.assert_close(traced(x), model(x))


def test_a_layer_alone_is_not_traced() -> None:
    with pytest.raises(TypeError, match=r"root must be a network for torch\.fx to trace, got SPConv2d alone"):
        torch.fx.symbolic_trace(SPConv2d(8, 8, 3))


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


def test_attributes_of_the_layer_are_its_own() -> None:
    conv = nn.Conv2d(16, 8, 3)
    conv.alpha, conv.backend = 3, "its own"
    (made,) = convert(nn.Sequential(conv))
    assert (made.alpha, made.backend) == (0.5, "auto")


def test_geometry_that_was_assigned_as_numbers() -> None:
    """As nn.Conv2d goes on running with."""
    conv = nn.Conv2d(16, 16, 3)
    conv.padding, conv.stride, conv.dilation, conv.kernel_size = 2, 1, 2, 3
    model = convert(nn.Sequential(conv))
    x = torch.randn(1, 16, 9, 9)
    assert isinstance(model[0], SPConv2d)
    assert model(x).shape == conv(x).shape
    conv.kernel_size = 1
    assert convert(nn.Sequential(conv))[0] is conv
