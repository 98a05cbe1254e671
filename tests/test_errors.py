"""Bad arguments fail at the call, with a message that names the argument, what it got and what is legal.

Each row is one mistake in an otherwise right call: what is replaced, the exception, and parts of its message.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from spconv_triton import SPConv2d, functional
from spconv_triton.dispatch import INTERPRETED

Row = tuple[dict[str, Any], type[Exception], tuple[str, ...]]


def ones(*shape: int, **like: Any) -> torch.Tensor:
    return torch.ones(shape, **like)


def rows(table: dict[str, Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("wrong", "error", "parts"), list(table.values()), ids=list(table))


def refused(call: Callable[[], Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


# L = 8, alpha L = 4, G = 2, M = 6, k = 3.
def layer_arguments() -> dict[str, Any]:
    return {
        "x": ones(2, 8, 6, 5),
        "weight_gwc": ones(6, 2, 3, 3),
        "weight_pwc": ones(6, 4, 1, 1),
        "weight_redundant": ones(6, 4, 1, 1),
        "bias": ones(6),
        "branch_bias": ones(2, 6),
    }


def branch_arguments() -> dict[str, Any]:
    return {"x3": ones(2, 4, 6, 5), "weight_gwc": ones(6, 2, 3, 3), "weight_pwc": ones(6, 4, 1, 1)}


def redundant_arguments() -> dict[str, Any]:
    return {"x1": ones(2, 4, 6, 5), "weight_redundant": ones(6, 4, 1, 1), "kernel_size": 3}


def constructor_arguments() -> dict[str, Any]:
    return {"in_channels": 8, "out_channels": 6, "kernel_size": 3}


def test_the_right_calls_are_right() -> None:
    """Otherwise the rows below could be refused for another reason than theirs."""
    assert functional.spconv2d(**layer_arguments()).shape == (2, 6, 4, 3)
    assert functional.representative_branch(**branch_arguments()).shape == (2, 6, 4, 3)
    assert functional.redundant_branch(**redundant_arguments()).shape == (2, 6, 4, 3)
    assert functional.gap_softmax_fusion(ones(2, 3, 4, 5), ones(2, 3, 4, 5)).shape == (2, 3, 4, 5)
    assert SPConv2d(**constructor_arguments())(ones(2, 8, 6, 5)).shape == (2, 6, 4, 3)


def input_rows(name: str, channels: int) -> dict[str, Row]:
    """Mistakes in the activation that a function calls ``name``."""
    dtypes = "float32, bfloat16, float16 or float64"
    return {
        f"{name}-list": ({name: [1.0]}, TypeError, (name, "torch.Tensor", "got list")),
        f"{name}-none": ({name: None}, TypeError, (name, "torch.Tensor", "got NoneType")),
        f"{name}-int": ({name: ones(2, channels, 6, 5).long()}, TypeError, (name, dtypes, "got torch.int64")),
        f"{name}-bool": ({name: ones(2, channels, 6, 5).bool()}, TypeError, (name, dtypes, "got torch.bool")),
        f"{name}-complex": ({name: ones(2, channels, 6, 5).cfloat()}, TypeError, (name, dtypes, "torch.complex64")),
        f"{name}-unbatched": (
            {name: ones(channels, 6, 5)},
            ValueError,
            (name, "4 dimensions [N, C, H, W]", f"got 3: [{channels}, 6, 5]"),
        ),
        f"{name}-video": (
            {name: ones(1, 2, channels, 6, 5)},
            ValueError,
            (name, "4 dimensions [N, C, H, W]", f"got 5: [1, 2, {channels}, 6, 5]"),
        ),
        f"{name}-small": (
            {name: ones(2, channels, 6, 2)},
            ValueError,
            (name, "smaller than the window", "[6, 2]", "kernel_size (3, 3)", "padding (0, 0)"),
        ),
        f"{name}-small-dilated": (
            {name: ones(2, channels, 6, 5), "dilation": 3},
            ValueError,
            (name, "smaller than the window", "[6, 5]", "dilation (3, 3)"),
        ),
        f"{name}-no-pixel": (
            {name: ones(2, channels, 0, 5), "padding": 2},
            ValueError,
            (name, "at least one pixel", f"got [2, {channels}, 0, 5]"),
        ),
    }


WINDOW: dict[str, Row] = {
    "stride-0": ({"stride": 0}, ValueError, ("stride", "at least 1", "got 0")),
    "stride-negative": ({"stride": (1, -1)}, ValueError, ("stride", "at least 1", "got (1, -1)")),
    "stride-float": ({"stride": 2.0}, TypeError, ("stride", "an int or a pair of ints", "got 2.0")),
    "stride-bool": ({"stride": True}, TypeError, ("stride", "an int or a pair of ints", "got True")),
    "stride-bool-in-pair": ({"stride": (True, 1)}, TypeError, ("stride", "a pair of ints", "got (True, 1)")),
    "stride-triple": ({"stride": (1, 1, 1)}, ValueError, ("stride", "one or two ints", "got (1, 1, 1)")),
    "stride-word": ({"stride": "same"}, TypeError, ("stride", "an int or a pair of ints", "got 'same'")),
    "stride-none": ({"stride": None}, TypeError, ("stride", "an int or a pair of ints", "got None")),
    "stride-empty": ({"stride": ()}, ValueError, ("stride", "one or two ints", "got ()")),
    "padding-negative": ({"padding": -1}, ValueError, ("padding", "at least 0", "got -1")),
    "padding-float": ({"padding": (0.5, 1)}, TypeError, ("padding", "a pair of ints", "got (0.5, 1)")),
    "padding-bool": ({"padding": False}, TypeError, ("padding", "a pair of ints", "got False")),
    "padding-edges": ({"padding": (1, 1, 1, 1)}, ValueError, ("padding", "one or two ints", "got (1, 1, 1, 1)")),
    "padding-word": ({"padding": "full"}, ValueError, ("padding", "'same', 'valid'", "got 'full'")),
    "padding-same-stride": ({"padding": "same", "stride": 2}, ValueError, ("padding='same'", "stride 1", "stride=2")),
    "dilation-0": ({"dilation": 0}, ValueError, ("dilation", "at least 1", "got 0")),
    "dilation-float": ({"dilation": 1.5}, TypeError, ("dilation", "a pair of ints", "got 1.5")),
    "dilation-bool": ({"dilation": True}, TypeError, ("dilation", "a pair of ints", "got True")),
}

GROUPS: dict[str, Row] = {
    "groups-0": ({"groups": 0}, ValueError, ("groups", "at least 1", "got 0")),
    "groups-negative": ({"groups": -2}, ValueError, ("groups", "at least 1", "got -2")),
    "groups-float": ({"groups": 2.0}, TypeError, ("groups", "an int", "got 2.0")),
    "groups-bool": ({"groups": True}, TypeError, ("groups", "an int", "got True")),
    "groups-pair": ({"groups": (2, 2)}, TypeError, ("groups", "an int", "got (2, 2)")),
    "groups-none": ({"groups": None}, TypeError, ("groups", "an int", "got None")),
    "groups-3": ({"groups": 3}, ValueError, ("groups", "divide", "4", "6", "got 3")),
    "groups-4": ({"groups": 4}, ValueError, ("groups", "divide", "4", "6", "got 4")),
}

BACKEND: dict[str, Row] = {
    name: ({"backend": value}, ValueError, ("backend", "'auto', 'triton', 'native', 'reference'", f"got {value!r}"))
    for name, value in {"backend-cuda": "cuda", "backend-none": None, "backend-list": ["auto"]}.items()
}

BRANCH_WEIGHTS: dict[str, Row] = {
    "gwc-none": ({"weight_gwc": None}, TypeError, ("weight_gwc", "torch.Tensor", "got NoneType")),
    "gwc-flat": ({"weight_gwc": ones(6, 2, 9)}, ValueError, ("weight_gwc", "4 dimensions", "got 3: [6, 2, 9]")),
    "gwc-even": ({"weight_gwc": ones(6, 2, 3, 4)}, ValueError, ("kernel_size", "odd", "got (3, 4)")),
    "gwc-no-tap": ({"weight_gwc": ones(6, 2, 0, 3)}, ValueError, ("kernel_size", "at least 1", "got (0, 3)")),
    "gwc-ungrouped": (
        {"weight_gwc": ones(6, 4, 3, 3)},
        ValueError,
        ("weight_gwc", "alpha L = 4", "G = 2", "got [6, 4, 3, 3]"),
    ),
    "gwc-outputs": ({"weight_gwc": ones(8, 2, 3, 3)}, ValueError, ("weight_pwc", "[8, ", "got [6, 4, 1, 1]")),
    "gwc-dtype": (
        {"weight_gwc": ones(6, 2, 3, 3).double()},
        TypeError,
        ("weight_gwc", "torch.float32", "got torch.float64"),
    ),
    "gwc-device": ({"weight_gwc": ones(6, 2, 3, 3, device="meta")}, ValueError, ("weight_gwc", "cpu", "got meta")),
    "pwc-none": ({"weight_pwc": None}, TypeError, ("weight_pwc", "torch.Tensor", "got NoneType")),
    "pwc-flat": ({"weight_pwc": ones(6, 4)}, ValueError, ("weight_pwc", "[6, alpha L, 1, 1]", "got [6, 4]")),
    "pwc-k": ({"weight_pwc": ones(6, 4, 3, 3)}, ValueError, ("weight_pwc", "[6, alpha L, 1, 1]", "got [6, 4, 3, 3]")),
    "pwc-outputs": ({"weight_pwc": ones(4, 4, 1, 1)}, ValueError, ("weight_pwc", "[6, ", "got [4, 4, 1, 1]")),
    "pwc-channels": (
        {"weight_pwc": ones(6, 6, 1, 1)},
        ValueError,
        ("weight_gwc", "alpha L = 6", "G = 2", "got [6, 2, 3, 3]"),
    ),
    "pwc-dtype": ({"weight_pwc": ones(6, 4, 1, 1).half()}, TypeError, ("weight_pwc", "float32", "got torch.float16")),
    "pwc-device": ({"weight_pwc": ones(6, 4, 1, 1, device="meta")}, ValueError, ("weight_pwc", "cpu", "got meta")),
    "no-representative": (
        {"weight_gwc": ones(6, 0, 3, 3), "weight_pwc": ones(6, 0, 1, 1)},
        ValueError,
        ("weight_gwc", "alpha L = 0"),
    ),
    "no-outputs": (
        {"weight_gwc": ones(0, 2, 3, 3), "weight_pwc": ones(0, 4, 1, 1)},
        ValueError,
        ("weight_gwc", "at least one output channel", "got [0, 2, 3, 3]"),
    ),
}

LAYER: dict[str, Row] = {
    "channels-many": ({"x": ones(2, 9, 6, 5)}, ValueError, ("x must", "8 channels", "4 representative", "got 9")),
    "channels-few": ({"x": ones(2, 7, 6, 5)}, ValueError, ("x must", "8 channels", "4 representative", "got 7")),
    "channels-none-left": ({"x": ones(2, 3, 6, 5)}, ValueError, ("x must", "at least the 4", "got 3 channels")),
    "redundant-missing": ({"weight_redundant": None}, ValueError, ("4 channels", "weight_redundant is None", "got 8")),
    "redundant-list": ({"weight_redundant": [1.0]}, TypeError, ("weight_redundant", "torch.Tensor", "got list")),
    "redundant-flat": ({"weight_redundant": ones(6, 4)}, ValueError, ("weight_redundant", "[6, L", "got [6, 4]")),
    "redundant-k": (
        {"weight_redundant": ones(6, 4, 3, 3)},
        ValueError,
        ("weight_redundant", "[6, L", "1, 1]", "got [6, 4, 3, 3]"),
    ),
    "redundant-outputs": (
        {"weight_redundant": ones(5, 4, 1, 1)},
        ValueError,
        ("weight_redundant", "[6, L", "got [5, 4, 1, 1]"),
    ),
    "redundant-channels": ({"weight_redundant": ones(6, 5, 1, 1)}, ValueError, ("9 channels", "5 redundant", "got 8")),
    "redundant-dtype": (
        {"weight_redundant": ones(6, 4, 1, 1).bfloat16()},
        TypeError,
        ("weight_redundant", "torch.float32", "got torch.bfloat16"),
    ),
    "redundant-device": (
        {"weight_redundant": ones(6, 4, 1, 1, device="meta")},
        ValueError,
        ("weight_redundant", "cpu", "got meta"),
    ),
    "bias-shape": ({"bias": ones(5)}, ValueError, ("bias", "[6]", "got [5]")),
    "bias-rank": ({"bias": ones(1, 6)}, ValueError, ("bias", "[6]", "got [1, 6]")),
    "bias-list": ({"bias": [0.0] * 6}, TypeError, ("bias", "torch.Tensor", "got list")),
    "bias-flag": ({"bias": True}, TypeError, ("bias", "torch.Tensor", "got bool")),
    "bias-dtype": ({"bias": ones(6).double()}, TypeError, ("bias", "torch.float32", "got torch.float64")),
    "bias-device": ({"bias": ones(6, device="meta")}, ValueError, ("bias", "cpu", "got meta")),
    "branch-bias-one": ({"branch_bias": ones(6)}, ValueError, ("branch_bias", "[2, 6]", "got [6]")),
    "branch-bias-turned": ({"branch_bias": ones(6, 2)}, ValueError, ("branch_bias", "[2, 6]", "got [6, 2]")),
    "branch-bias-pair": ({"branch_bias": (ones(6), ones(6))}, TypeError, ("branch_bias", "Tensor", "got tuple")),
    "branch-bias-dtype": ({"branch_bias": ones(2, 6).double()}, TypeError, ("branch_bias", "got torch.float64")),
    "branch-bias-device": ({"branch_bias": ones(2, 6, device="meta")}, ValueError, ("branch_bias", "got meta")),
}


@rows({**input_rows("x", 8), **WINDOW, **GROUPS, **BACKEND, **BRANCH_WEIGHTS, **LAYER})
def test_spconv2d(wrong: dict[str, Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    refused(lambda: functional.spconv2d(**{**layer_arguments(), **wrong}), error, parts)


@rows(
    {
        **input_rows("x3", 4),
        "x3-channels": ({"x3": ones(2, 5, 6, 5)}, ValueError, ("x3", "4 channels of weight_pwc", "got 5")),
        **WINDOW,
        **GROUPS,
        **BACKEND,
        **BRANCH_WEIGHTS,
    }
)
def test_representative_branch(wrong: dict[str, Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    refused(lambda: functional.representative_branch(**{**branch_arguments(), **wrong}), error, parts)


@rows(
    {
        **input_rows("x1", 4),
        "x1-channels": ({"x1": ones(2, 5, 6, 5)}, ValueError, ("x1", "4 channels of weight_redundant", "got 5")),
        **WINDOW,
        "weight-none": ({"weight_redundant": None}, TypeError, ("weight_redundant", "got NoneType")),
        "weight-flat": ({"weight_redundant": ones(6, 4)}, ValueError, ("weight_redundant", "[M, 4, 1, 1]", "[6, 4]")),
        "weight-k": ({"weight_redundant": ones(6, 4, 3, 3)}, ValueError, ("weight_redundant", "got [6, 4, 3, 3]")),
        "weight-dtype": ({"weight_redundant": ones(6, 4, 1, 1).half()}, TypeError, ("weight_redundant", "float16")),
        "weight-device": (
            {"weight_redundant": ones(6, 4, 1, 1, device="meta")},
            ValueError,
            ("weight_redundant", "device of x1", "got meta"),
        ),
        "kernel-even": ({"kernel_size": (2, 3)}, ValueError, ("kernel_size", "odd", "got (2, 3)")),
        "kernel-0": ({"kernel_size": 0}, ValueError, ("kernel_size", "at least 1", "got 0")),
        "kernel-float": ({"kernel_size": 3.0}, TypeError, ("kernel_size", "a pair of ints", "got 3.0")),
    }
)
def test_redundant_branch(wrong: dict[str, Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    refused(lambda: functional.redundant_branch(**{**redundant_arguments(), **wrong}), error, parts)


@rows(
    {
        "u3-list": ({"u3": [1.0]}, TypeError, ("u3", "torch.Tensor", "got list")),
        "u3-rank": ({"u3": ones(3, 4, 5)}, ValueError, ("u3", "4 dimensions", "got 3: [3, 4, 5]")),
        "u3-int": ({"u3": ones(2, 3, 4, 5).int()}, TypeError, ("u3", "float32", "got torch.int32")),
        "u1-none": ({"u1": None}, TypeError, ("u1", "torch.Tensor", "got NoneType")),
        "u1-size": ({"u1": ones(2, 3, 4, 4)}, ValueError, ("u1", "[2, 3, 4, 5]", "got [2, 3, 4, 4]")),
        "u1-broadcast": ({"u1": ones(1, 3, 4, 5)}, ValueError, ("u1", "[2, 3, 4, 5]", "got [1, 3, 4, 5]")),
        "u1-rank": ({"u1": ones(3, 4, 5)}, ValueError, ("u1", "[2, 3, 4, 5]", "got [3, 4, 5]")),
        "u1-dtype": ({"u1": ones(2, 3, 4, 5).half()}, TypeError, ("u1", "torch.float32", "got torch.float16")),
        "u1-device": ({"u1": ones(2, 3, 4, 5, device="meta")}, ValueError, ("u1", "device of u3, cpu", "got meta")),
        "no-pixel": (
            {"u3": ones(2, 3, 0, 5), "u1": ones(2, 3, 0, 5)},
            ValueError,
            ("u3", "at least one pixel", "got [2, 3, 0, 5]"),
        ),
        **BACKEND,
    }
)
def test_gap_softmax_fusion(wrong: dict[str, Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    right = {"u3": ones(2, 3, 4, 5), "u1": ones(2, 3, 4, 5)}
    refused(lambda: functional.gap_softmax_fusion(**{**right, **wrong}), error, parts)


CALLS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "spconv2d": lambda dtype: functional.spconv2d(
        **{name: value.to(dtype) for name, value in layer_arguments().items()}, backend="triton"
    ),
    "representative_branch": lambda dtype: functional.representative_branch(
        **{name: value.to(dtype) for name, value in branch_arguments().items()}, backend="triton"
    ),
    "gap_softmax_fusion": lambda dtype: functional.gap_softmax_fusion(
        ones(2, 3, 4, 5, dtype=dtype), ones(2, 3, 4, 5, dtype=dtype), backend="triton"
    ),
}


@pytest.mark.parametrize("call", list(CALLS.values()), ids=list(CALLS))
def test_triton_has_no_float64(call: Callable[[torch.dtype], torch.Tensor]) -> None:
    parts = ("backend='triton' cannot run here", "float32, bfloat16 and float16", "torch.float64", "'native'")
    refused(functools.partial(call, torch.float64), ValueError, parts)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs the kernels on a CPU")
@pytest.mark.parametrize("call", list(CALLS.values()), ids=list(CALLS))
def test_triton_has_no_cpu(call: Callable[[torch.dtype], torch.Tensor]) -> None:
    parts = ("backend='triton' cannot run here", "on cpu, not on a GPU", "TRITON_INTERPRET=1", "'native'")
    refused(functools.partial(call, torch.float32), ValueError, parts)


@rows(
    {
        "in-0": ({"in_channels": 0}, ValueError, ("in_channels", "at least 1", "got 0")),
        "in-float": ({"in_channels": 8.0}, TypeError, ("in_channels", "an int", "got 8.0")),
        "in-bool": ({"in_channels": True}, TypeError, ("in_channels", "an int", "got True")),
        "out-negative": ({"out_channels": -6}, ValueError, ("out_channels", "at least 1", "got -6")),
        "out-text": ({"out_channels": "6"}, TypeError, ("out_channels", "an int", "got '6'")),
        "kernel-even": ({"kernel_size": 2}, ValueError, ("kernel_size", "odd", "got 2")),
        "kernel-half-even": ({"kernel_size": (3, 4)}, ValueError, ("kernel_size", "odd", "got (3, 4)")),
        "kernel-0": ({"kernel_size": 0}, ValueError, ("kernel_size", "at least 1", "got 0")),
        "kernel-triple": ({"kernel_size": (3, 3, 3)}, ValueError, ("kernel_size", "one or two", "got (3, 3, 3)")),
        "kernel-float": ({"kernel_size": 3.0}, TypeError, ("kernel_size", "a pair of ints", "got 3.0")),
        "kernel-bool": ({"kernel_size": True}, TypeError, ("kernel_size", "a pair of ints", "got True")),
        "kernel-text": ({"kernel_size": "3"}, TypeError, ("kernel_size", "a pair of ints", "got '3'")),
        **WINDOW,
        **{name: row for name, row in GROUPS.items() if name not in ("groups-3", "groups-4")},
        "groups-3": ({"groups": 3}, ValueError, ("groups=3", "representative channels", "int(8 * 0.5) = 4")),
        "groups-8": ({"groups": 8}, ValueError, ("groups=8", "representative channels", "int(8 * 0.5) = 4")),
        "groups-4": ({"groups": 4}, ValueError, ("groups", "divide out_channels=6", "got groups=4")),
        "alpha-0": ({"alpha": 0}, ValueError, ("alpha", "(0, 1]", "got 0")),
        "alpha-negative": ({"alpha": -0.5}, ValueError, ("alpha", "(0, 1]", "got -0.5")),
        "alpha-above-1": ({"alpha": 1.5}, ValueError, ("alpha", "(0, 1]", "got 1.5")),
        "alpha-nan": ({"alpha": float("nan")}, ValueError, ("alpha", "(0, 1]", "got nan")),
        "alpha-text": ({"alpha": "half"}, TypeError, ("alpha", "a number", "got 'half'")),
        "alpha-bool": ({"alpha": True}, TypeError, ("alpha", "a number", "got True")),
        "alpha-none": ({"alpha": None}, TypeError, ("alpha", "a number", "got None")),
        "alpha-too-small": ({"alpha": 0.1}, ValueError, ("alpha=0.1", "groups=2", "int(8 * 0.1) = 0")),
        "alpha-odd": ({"alpha": 0.375}, ValueError, ("alpha=0.375", "groups=2", "int(8 * 0.375) = 3")),
        "mode-mirror": ({"padding_mode": "mirror"}, ValueError, ("padding_mode", "'reflect'", "got 'mirror'")),
        "mode-none": ({"padding_mode": None}, ValueError, ("padding_mode", "'zeros'", "got None")),
        "dtype-int": ({"dtype": torch.int32}, TypeError, ("dtype", "float32, bfloat16, float16 or float64", "int32")),
        "dtype-complex": ({"dtype": torch.cfloat}, TypeError, ("dtype", "float32, bfloat16", "complex64")),
        "dtype-float8": ({"dtype": torch.float8_e4m3fn}, TypeError, ("dtype", "float32, bfloat16", "float8_e4m3fn")),
        **BACKEND,
    }
)
def test_constructor(wrong: dict[str, Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    refused(lambda: SPConv2d(**{**constructor_arguments(), **wrong}), error, parts)


@pytest.mark.parametrize("branch_norm", [False, True])
@rows(
    {
        "rank": ({"x": ones(8, 6, 5)}, ValueError, ("x must have 4 dimensions", "got 3: [8, 6, 5]")),
        "channels": ({"x": ones(1, 7, 6, 5)}, ValueError, ("x must have 8 channels", "got 7")),
        "dtype": ({"x": ones(1, 8, 6, 5).double()}, TypeError, ("dtype of x", "float64", "got torch.float32")),
        "small": ({"x": ones(1, 8, 2, 5)}, ValueError, ("is smaller than the window", "[2, 5]")),
        "none": ({"x": None}, TypeError, ("x must be a torch.Tensor", "NoneType")),
    }
)
def test_forward(branch_norm: bool, wrong: dict[str, Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    layer = SPConv2d(**constructor_arguments(), branch_norm=branch_norm)
    refused(lambda: layer(wrong["x"]), error, parts)


COMPILED = {
    "channels": LAYER["channels-few"],
    "dtype": input_rows("x", 8)["x-int"],
    "bias": LAYER["bias-shape"],
    "stride": WINDOW["stride-word"],
    "backend": BACKEND["backend-cuda"],
}


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@rows(COMPILED)
def test_compiled_raises_the_same(wrong: dict[str, Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    """Tracing is where the checks run, so no compiler is needed behind it."""
    arguments = {**layer_arguments(), **wrong}
    refused(lambda: torch.compile(functional.spconv2d, backend="eager")(**arguments), error, parts)


@pytest.mark.usefixtures("fresh_dynamo")
@rows(COMPILED)
def test_fullgraph_carries_the_message(wrong: dict[str, Any], error: type[Exception], parts: tuple[str, ...]) -> None:
    arguments = {**layer_arguments(), **wrong}
    compiled = torch.compile(functional.spconv2d, backend="eager", fullgraph=True)
    refused(lambda: compiled(**arguments), torch._dynamo.exc.Unsupported, (error.__name__, *parts))
