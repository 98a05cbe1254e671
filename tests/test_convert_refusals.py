"""convert: what stays and why, and what is refused; neither changes anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from convert_cases import Block, reasons, report_of, snapshot, swapped
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from spconv_triton import SPConv2d, convert
from spconv_triton.conversion import Conversion


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
        with pytest.raises(ValueError, match=r"yet, but it is; convert its \.module, then wrap it anew"):
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
