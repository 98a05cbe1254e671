"""Autocast, loss scaling and the float32 precision settings, of a converted network on a CPU.

tests/test_modules.py has a layer under autocast, tests/kernels/test_kernel_transforms.py the operators' own rule.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_within_budget
from small_network import CLASSES, images, small_network
from torch import Tensor, nn

from spconv_triton import SPConv2d, functional
from spconv_triton.native.products import can_be_matrix_product

HALVES = (torch.bfloat16, torch.float16)


def results(network: nn.Module, x: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Output and gradients, under autocast to ``dtype`` if given."""
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        y = network(x)
    names, leaves = zip(*network.named_parameters(), strict=True)
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y.float().square().mean(), leaves), strict=True))}


def convolutions_only(network: nn.Module) -> nn.Module:
    """With plain convolutions where the SPConv layers stood: how far off autocast is anyway."""
    replaced = copy.deepcopy(network)
    for name, module in network.named_modules():
        if isinstance(module, SPConv2d):
            dense = nn.Conv2d(
                module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding
            )
            replaced.set_submodule(name, dense)
    return replaced


def error(network: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Of output and gradients under autocast, by name, relative to the largest element."""
    exact = results(copy.deepcopy(network).double(), x.double(), None)
    got = results(network, x, dtype)
    return {
        name: ((got[name].double() - judge).abs().max() / judge.abs().max().clamp(min=1e-6)).item()
        for name, judge in exact.items()
    }


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("branch_norm", [False, True])
def test_network_is_as_exact_as_one_of_convolutions(branch_norm: bool, dtype: torch.dtype) -> None:
    network = small_network(branch_norm=branch_norm).eval()
    x = images()
    ours, plain = error(network, x, dtype)["y"], error(convolutions_only(network), x, dtype)["y"]
    assert ours <= 4 * (plain + torch.finfo(dtype).eps), f"{ours:.2e}, with plain convolutions {plain:.2e}"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_parameters_and_gradients_stay_in_float32(dtype: torch.dtype) -> None:
    network = small_network(branch_norm=True)
    x = images().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = network(x)
        assert y.dtype == dtype
        F.cross_entropy(y, torch.randint(CLASSES, (4,))).backward()  # within, as some loops do
    for name, p in [("x", x), *network.named_parameters()]:
        assert p.dtype == p.grad.dtype == torch.float32, name
        assert p.grad.isfinite().all(), name
    assert all(buffer.dtype != dtype for buffer in network.buffers())


def test_disabled_within_is_disabled() -> None:
    """As for accuracy-sensitive parts of a network: the region inside decides."""
    layer = SPConv2d(8, 12, 3, padding=1)
    x = torch.randn(2, 8, 6, 5)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(layer(x), expected)
            with pytest.raises(TypeError, match="weight_gwc"):
                layer(x.bfloat16())
        with torch.autocast("cpu", torch.float16):
            assert layer(x).dtype == torch.float16


@pytest.mark.parametrize("options", [{}, {"branch_norm": True}, {"alpha": 1.0}], ids=str)
@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_is_of_the_dtype_of_its_forward(create_graph: bool, options: dict[str, Any]) -> None:
    """A part of a network in float32 keeps its gradients so, though the step's backward is called under autocast."""
    layer = SPConv2d(8, 12, 3, padding=1, **options)
    x = torch.randn(2, 8, 6, 5, requires_grad=True)
    leaves = [x, *layer.parameters()]
    grad = torch.randn_like(layer(x))
    expected = torch.autograd.grad(layer(x), leaves, grad)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = layer(x)
        got = torch.autograd.grad(y, leaves, grad, create_graph=create_graph)
    for value, judge in zip(got, expected, strict=True):
        torch.testing.assert_close(value, judge)


def test_branches_may_leave_autocast_in_different_dtypes() -> None:
    """A norm that autocast computes in float32 beside one that it leaves in half precision."""
    layer = SPConv2d(8, 12, 3, padding=1, branch_norm=True)
    layer.norm_representative = nn.LayerNorm([12, 6, 5])
    x = torch.randn(2, 8, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    expected = layer(x)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_loss_scaling_skips_what_overflows() -> None:
    """GradScaler on a CPU: a step whose gradients overflow is skipped and the scale halved; then training goes on."""
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    x, labels = images(8), torch.randint(CLASSES, (8,))
    losses, scales, changed = [], [], []
    for _ in range(8):
        before = [p.detach().clone() for p in network.parameters()]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(network(x), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
        changed.append(not all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)))
        if not changed[-1]:
            scaler.update(2.0**10)  # straight to a scale that fits, for half of 2^120 does not
    assert scales[0] == 2.0**119
    assert not changed[0]
    assert all(changed[1:])
    assert losses[-1] < losses[0]


def test_unscaled_gradients_are_those_without_a_scale() -> None:
    network = small_network().eval()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    x = images()
    expected = results(network, x, torch.bfloat16)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x)
    scaler.scale(y.float().square().mean()).backward()
    scaler.unscale_(optimizer)
    for name, p in network.named_parameters():
        assert torch.equal(p.grad, expected[name]), name  # a power of two rounds nothing


PRECISIONS: dict[str, tuple[Callable[[], str], Callable[[str], None], str]] = {
    **{
        setting: (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, setting)
        for setting in ("highest", "high", "medium")
    },
    **{
        f"{name}={setting}": (
            functools.partial(operator.attrgetter("fp32_precision"), module),
            functools.partial(setattr, module, "fp32_precision"),
            setting,
        )
        for name, module, setting in (
            ("cuda.matmul", torch.backends.cuda.matmul, "tf32"),
            ("mkldnn.matmul", torch.backends.mkldnn.matmul, "tf32"),
            ("mkldnn.matmul", torch.backends.mkldnn.matmul, "bf16"),
            ("backends", torch.backends, "tf32"),
        )
    },
}
"""How a precision is asked for and set, in the old way and the new, and to what."""


@pytest.fixture(params=PRECISIONS)
def _matmul_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    get, put, setting = PRECISIONS[request.param]
    before = get()
    put(setting)
    yield
    put(before)


@pytest.mark.usefixtures("_matmul_precision")
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"branch_norm": True}], ids=str)
def test_float32_stays_whatever_matrix_products_are_set_to(options: dict[str, Any]) -> None:
    """They are not convolutions: ``nn.Conv2d`` stays in float32, and so does a layer, though parts of it are matrix
    products. Where a precision was set by ``torch.backends``, PyTorch refuses to say what the old way would."""
    layer = SPConv2d(64, 64, 3, padding=1, **options)
    x = torch.randn(2, 64, 20, 20)
    judge, twin = copy.deepcopy(layer).double(), copy.deepcopy(layer)
    twin.backend = judge.backend = "reference"
    got, near, exact = (results(m, x.to(m.bias.dtype), None) for m in (layer, twin, judge))
    for name, value in got.items():
        assert_within_budget(name, value, near[name], exact[name], condition=8.0)


def test_products_of_bfloat16_are_not_taken_for_convolutions() -> None:
    """At "medium", products of float32 matrices are bfloat16's on processors that have them; convolutions are not."""
    x = torch.randn(2, 8, 6, 5)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not can_be_matrix_product(x)
        assert can_be_matrix_product(x.double())
        torch.set_float32_matmul_precision("high")
        assert can_be_matrix_product(x)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"branch_norm": True}, {"alpha": 1.0}], ids=str)
def test_float64_stays(options: dict[str, Any], training: bool) -> None:
    layer = SPConv2d(8, 8, 3, padding=1, dtype=torch.float64, **options).train(training)
    other = copy.deepcopy(layer)
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, other(x))


def test_what_may_be_float32_is_cast_from_the_other_half_precision() -> None:
    """All of a layer in float16, under autocast to bfloat16."""
    x, gwc, pwc, redundant = (
        torch.randn(shape).half() for shape in ((2, 8, 6, 5), (6, 2, 3, 3), (6, 4, 1, 1), (6, 4, 1, 1))
    )
    bias, scale, branch_bias = (torch.randn(shape).half() for shape in (6, 6, (2, 6)))
    calls: tuple[Callable[[], Tensor], ...] = (
        lambda: functional.spconv2d(x, gwc, pwc, redundant, bias, branch_bias=branch_bias),
        lambda: functional.spconv2d_inference(
            x, gwc, pwc, redundant, bias, branch_bias=branch_bias, norm_scale=scale, residual=x[:, :6, 2:, 2:]
        ),
        lambda: functional.spconv2d_batch_norm(x, gwc, pwc, redundant, bias, norm_representative=(scale, bias))[0],
    )
    for call in calls:
        exact = call().float()
        with torch.autocast("cpu", torch.bfloat16):
            y = call()
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), exact, rtol=0, atol=0.04 * exact.abs().max().item())


def test_ints_are_not_cast() -> None:
    layer = SPConv2d(8, 8, 3, padding=1)
    weights = layer.weight_gwc, layer.weight_pwc.int(), layer.weight_redundant
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="weight_pwc must have the dtype of x"):
        functional.spconv2d(torch.randn(2, 8, 6, 5), *weights, padding=1)


def test_the_fusion_is_in_the_wider_dtype_of_either_branch() -> None:
    u = torch.randn(2, 8, 6, 5)
    for one, two in ((u.bfloat16(), u * 0.3), (u * 0.3, u.bfloat16())):
        with torch.autocast("cpu", torch.bfloat16):
            y = functional.gap_softmax_fusion(one, two)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, functional.gap_softmax_fusion(one.float(), two.float()))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_bias_behind_norms_widens_nothing(dtype: torch.dtype, norm: Callable[[int], nn.Module]) -> None:
    layer = SPConv2d(8, 8, 3, padding=1, branch_norm=True)
    layer.norm_representative, layer.norm_redundant = norm(8), norm(8)
    with torch.autocast("cpu", dtype):
        assert layer(torch.randn(2, 8, 6, 5)).dtype == dtype
