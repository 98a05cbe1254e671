"""Batch norms in the branches on a CPU, in one pass: against float64, and what is kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import BY_NAME, GATED, Case, kept_bytes
from norm_cases import NORMS, Leaves, batch_normed, check_over_draws, layer, make_leaves, run
from strategies import NOT_FINITE
from torch import Tensor, nn

from spconv_triton import SPConv2d, functional, set_recompute
from spconv_triton.native import batch_norm as native_batch_norm
from spconv_triton.native import folding


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those that took the one pass."""
    calls: list[Any] = []
    original = native_batch_norm.forward

    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(native_batch_norm, "forward", counted)
    return calls


@pytest.fixture(params=[True, False], ids=["recomputed", "kept"])
def recomputing(request: pytest.FixtureRequest) -> Iterator[bool]:
    with set_recompute(request.param):
        yield request.param


@pytest.mark.usefixtures("poisoned_empty", "recomputing")
@pytest.mark.parametrize("weights", ["given", "folded", "merged"])
@pytest.mark.parametrize("case", GATED, ids=str)
def test_agrees_with_float64(case: Case, weights: str, forwards: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "MERGED_CHANNELS", 1 << 30 if weights == "merged" else 0)
    monkeypatch.setattr(folding, "FEW_PRODUCTS", float("inf"))
    monkeypatch.setattr(folding, "FOLDED_PRODUCTS", 0 if weights == "folded" else float("inf"))
    check_over_draws(lambda: make_leaves(case), case, 8, "native")
    check_over_draws(
        lambda: make_leaves(case, dtype=torch.float64, memory_format=torch.contiguous_format), case, 2, "native"
    )
    assert len(forwards) == 8 + 2


@pytest.mark.parametrize("value", NOT_FINITE)
def test_zeros_among_merged_weights_spread_nothing(value: float) -> None:
    """At the edge without padding, x3 is read by its own group and no point-wise convolution."""
    layer = SPConv2d(8, 8, 3, bias=False, branch_norm=True)
    judge = SPConv2d(8, 8, 3, bias=False, branch_norm=True, backend="reference")
    judge.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, 6, 5)
    x[0, 1, 0, 0] = value
    y, expected = layer(x), judge(x)
    assert expected.isnan().any(), "the case has something to spread"
    assert torch.equal(y.isnan(), expected.isnan())
    gradients = [torch.autograd.grad(out.sum(), m.parameters()) for out, m in ((y, layer), (expected, judge))]
    for found, right in zip(*gradients, strict=True):
        assert torch.equal(found.isnan(), right.isnan())


@pytest.mark.parametrize("missing", [("bias",), ("weight3", "bias3"), ("bias3", "weight1"), NORMS], ids=str)
def test_without_some_parameters(missing: tuple[str, ...]) -> None:
    case = BY_NAME["odd-pixels"]
    check_over_draws(lambda: {**make_leaves(case), **dict.fromkeys(missing)}, case, 4, "native")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_bias_without_a_weight_never_reaches_aten(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose norm in channels_last on a GPU is not differentiable then: "tensor does not have a device"."""
    calls: list[tuple[bool, bool]] = []
    batch_norm = nn.functional.batch_norm

    def counted(u: Tensor, mean: None, var: None, weight: Tensor | None, bias: Tensor | None, **options: Any) -> Tensor:
        calls.append((weight is None, bias is None))
        return batch_norm(u, mean, var, weight, bias, **options)

    monkeypatch.setattr(nn.functional, "batch_norm", counted)
    case = BY_NAME["odd-pixels"]
    leaves = {**make_leaves(case, dtype=torch.bfloat16), "weight3": None, "weight1": None, "bias1": None}
    y = layer(leaves, case, backend)[0]
    assert calls == [(False, False), (True, True)]
    with_ones = {**leaves, "weight3": torch.ones(case.out_channels)}
    assert torch.equal(y, layer(with_ones, case, backend)[0])


@pytest.mark.parametrize("gate", [-60.0, -8.0, 8.0, 60.0])
def test_saturated_gate(gate: float) -> None:
    case = BY_NAME["odd-pixels"]
    check_over_draws(lambda: make_leaves(case, gate=gate), case, 4, "native", condition=abs(gate))


@pytest.mark.parametrize("mean", [30.0, 1000.0])
@pytest.mark.parametrize("name", ["plain", "no-padding", "stride-2-odd"])
def test_large_means(name: str, mean: float) -> None:
    check_over_draws(lambda: make_leaves(BY_NAME[name], mean=mean), BY_NAME[name], 32, "native")


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("shape", [(8, 16, 56, 56), (3, 6, 35, 33), (2, 300, 7, 7), (1, 3, 1, 521)], ids=str)
def test_many_pixels_leave_few_roundings(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    """In means and in variances beside them; in ATen's variance in channels_last 33 to 60, at 8 x 56 x 56."""
    maps = (torch.randn(shape) + 3 * torch.randn(shape[1], 1, 1)).contiguous(memory_format=memory_format)
    statistics = native_batch_norm._statistics(maps)
    exact = torch.var_mean(maps.double(), (0, 2, 3), correction=0)
    few = 16 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(statistics.variance[0].double(), exact[0], rtol=few, atol=0)
    torch.testing.assert_close(statistics.mean[0].double(), exact[1], rtol=few, atol=few)
    torch.testing.assert_close(statistics.sample[0].double(), maps.double().mean((2, 3)), rtol=few, atol=few)


def test_a_channel_that_is_constant() -> None:
    """Its variance is 0, and what its norm multiplies a rounding by is 1 / sqrt(eps)."""
    case = BY_NAME["no-padding"]

    def draw() -> Leaves:
        leaves = make_leaves(case)
        with torch.no_grad():
            for name in ("weight_gwc", "weight_pwc", "weight_redundant"):
                leaves[name][:3].zero_()  # type: ignore[index]
        return leaves

    check_over_draws(draw, case, 8, "native")


@pytest.mark.usefixtures("recomputing")
@pytest.mark.parametrize("wanted", [("x",), ("weight_gwc",), ("weight_pwc", "bias1"), ("weight_redundant", "weight3")])
def test_gradients_of_some(wanted: tuple[str, ...]) -> None:
    case = BY_NAME["stride-2-odd"]
    leaves = make_leaves(case)
    grad = torch.randn(case.batch, case.out_channels, *case.output_size())
    expected = run(leaves, case, "native", grad)
    for name, leaf in leaves.items():
        if leaf is not None:
            leaf.requires_grad_(name in wanted)
    y = layer(leaves, case, "native")[0]
    for name, gradient in zip(wanted, torch.autograd.grad(y, [leaves[n] for n in wanted], grad), strict=True):
        torch.testing.assert_close(gradient, expected[name])


def test_what_is_kept_for_the_backward(recomputing: bool) -> None:
    """x and one map, as of nn.Conv2d and its norm, or two so that none is recomputed; part by part four."""
    case = Case("memory", 4, 32, 32, (16, 16))
    leaves = make_leaves(case)
    x = leaves["x"]
    assert x is not None
    maps = x.numel() * x.itemsize
    small = sum(leaf.numel() * leaf.itemsize for name, leaf in leaves.items() if name != "x" and leaf is not None)
    own = 2 * maps if recomputing else 3 * maps
    assert own < kept_bytes(lambda: layer(leaves, case, "native")[0]) <= 1.025 * own + small
    assert kept_bytes(lambda: layer(leaves, case, "reference")[0]) >= 4 * maps


@pytest.mark.usefixtures("recomputing")
def test_twice_through_one_graph_gives_the_same_bits() -> None:
    case = BY_NAME["odd-pixels"]
    leaves = make_leaves(case)
    before = {name: leaf.detach().clone() for name, leaf in leaves.items() if leaf is not None}
    present = [leaf for leaf in leaves.values() if leaf is not None]
    grad = torch.randn(case.batch, case.out_channels, *case.output_size())
    y = layer(leaves, case, "native")[0]
    first, second = (torch.autograd.grad(y, present, grad, retain_graph=True) for _ in range(2))
    again = layer(leaves, case, "native")[0]
    assert torch.equal(y, again)
    for one, two, three in zip(first, second, torch.autograd.grad(again, present, grad), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    for name, value in before.items():
        assert torch.equal(leaves[name].detach(), value), name  # type: ignore[union-attr]


def test_second_derivatives() -> None:
    case = BY_NAME["tiny"]
    leaves = make_leaves(case, dtype=torch.float64)
    present = [name for name, leaf in leaves.items() if leaf is not None]

    def function(*tensors: Tensor) -> Tensor:
        return layer({**leaves, **dict(zip(present, tensors, strict=True))}, case, "native")[0]

    inputs = [leaves[name].detach().double().requires_grad_() for name in present]  # type: ignore[union-attr]
    assert torch.autograd.gradgradcheck(function, inputs)


def test_function_transforms_see_the_parts(forwards: list[Any]) -> None:
    case = BY_NAME["tiny"]
    leaves = make_leaves(case, dtype=torch.float64)
    x = leaves["x"]
    assert x is not None
    by_transform = torch.func.grad(lambda x: layer({**leaves, "x": x}, case, "native")[0].square().sum())(x.detach())
    assert not forwards
    (expected,) = torch.autograd.grad(layer(leaves, case, "native")[0].square().sum(), x)
    assert forwards
    torch.testing.assert_close(by_transform, expected)


@pytest.fixture
def in_one(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of a layer that normalises by the batch in one pass."""
    return batch_normed(monkeypatch)


def test_layers_train_in_one_pass(in_one: list[str]) -> None:
    network = nn.Sequential(SPConv2d(8, 12, 3, padding=1, branch_norm=True), nn.ReLU(inplace=True)).double()
    parts = copy.deepcopy(network)
    parts[0].backend = "reference"
    x = torch.randn(3, 8, 6, 5, dtype=torch.float64)
    for _ in range(2):
        for one in (network, parts):
            one(x).square().sum().backward()
    assert in_one == ["auto"] * 2
    for (name, ours), theirs in zip(network.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda m, name=name: f"{name}: {m}")
    for ours, theirs in zip(network.buffers(), parts.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_half_precision_and_compiled_layers_stay_in_parts(in_one: list[str]) -> None:
    layer = SPConv2d(8, 12, 3, padding=1, branch_norm=True)
    copy.deepcopy(layer).bfloat16()(torch.randn(2, 8, 6, 5, dtype=torch.bfloat16))
    torch.compile(layer, backend="eager")(torch.randn(2, 8, 6, 5))
    assert not in_one


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_of_half_precision_are_float32(dtype: torch.dtype, backend: str) -> None:
    case = BY_NAME["plain"]
    leaves = make_leaves(case, dtype=dtype, mean=3.0)
    tensors = [leaves[name].detach() for name in ("x", "weight_gwc", "weight_pwc", "weight_redundant")]
    _, mean, variance = functional.spconv2d_batch_norm(*tensors, backend=backend, **case.window)
    exact = functional.spconv2d_batch_norm(*(t.float() for t in tensors), backend=backend, **case.window)[1]
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean, exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_statistics_have_no_gradients() -> None:
    for backend in ("native", "reference"):
        _, mean, variance = layer(make_leaves(BY_NAME["plain"]), BY_NAME["plain"], backend)
        assert not mean.requires_grad
        assert not variance.requires_grad


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_an_in_place_operation_may_follow(memory_format: torch.memory_format) -> None:
    leaves = make_leaves(BY_NAME["plain"], memory_format=memory_format)
    wanted = [leaf for leaf in leaves.values() if leaf is not None]
    got, expected = (
        torch.autograd.grad(act(layer(leaves, BY_NAME["plain"], "native")[0]).square().sum(), wanted)
        for act in (torch.relu_, torch.relu)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
