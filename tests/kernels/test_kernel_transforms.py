"""Where kernels run: function transforms and forward mode take ATen instead, backward operators are differentiable, and
operators called under autocast compute as a convolution does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BY_NAME, Case, Inputs, assert_within_budget_over_draws, make_inputs
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from spconv_triton import SPConv2d, functional
from spconv_triton.dispatch import choose

TINY = [BY_NAME["tiny"], BY_NAME["tiny-stride-2"]]
OPERATORS = torch.ops.spconv_triton


def pair(device: str, **options: Any) -> tuple[SPConv2d, SPConv2d]:
    """A layer on the kernels and its twin on the reference, or on ATen part by part."""
    ours = SPConv2d(8, 4, 3, 2, 1, backend="triton", device=device, **options)
    twin = SPConv2d(8, 4, 3, 2, 1, backend="native" if ours.branch_norm else "reference", device=device, **options)
    twin.load_state_dict(ours.state_dict())
    return ours, twin


LAYERS: dict[str, dict[str, Any]] = {"plain": {}, "alpha-1": {"alpha": 1.0}, "branch-norm": {"branch_norm": True}}
every_layer = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
TRANSFORMS: dict[str, Callable[[SPConv2d, Tensor], Any]] = {
    "grad": lambda layer, x: grad(lambda x: layer(x).square().sum())(x),
    "jvp": lambda layer, x: jvp(layer, (x,), (x.flip(0),)),
    "jvp of grad": lambda layer, x: jvp(grad(lambda x: layer(x).square().sum()), (x,), (x.flip(0),)),
    "per sample": lambda layer, x: vmap(grad(lambda x: layer(x[None]).square().sum()))(x),
}


@every_layer
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(transform: Callable[[SPConv2d, Tensor], Any], options: dict[str, Any], device: str) -> None:
    ours, twin = (layer.eval() for layer in pair(device, **options))  # what a training norm tracks is not transformed
    x = torch.randn(3, 8, 5, 4, device=device)
    torch.testing.assert_close(transform(ours, x), transform(twin, x))


@every_layer
@pytest.mark.parametrize("grads", [True, False], ids=("grad", "no-grad"))
def test_dual_numbers(grads: bool, options: dict[str, Any], device: str) -> None:
    ours, twin = pair(device, **options)
    x, u = torch.randn(2, 3, 8, 5, 4, device=device).unbind()
    with forward_ad.dual_level(), torch.set_grad_enabled(grads):
        assert choose(x, "triton") == "native"
        tangent, expected = (forward_ad.unpack_dual(m(forward_ad.make_dual(x, u))).tangent for m in (ours, twin))
    assert tangent is not None
    torch.testing.assert_close(tangent, expected)
    assert choose(x, "triton") == "triton"


def second_order(function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor, weights: list[Tensor]) -> Any:
    """Gradients of <weights, gradients of ``function``>, by ``grad`` and the leaves."""
    grad = grad.detach().requires_grad_()
    first = torch.autograd.grad(function(*leaves), leaves, grad, create_graph=True)
    total = sum((value * weight.to(value.dtype)).sum() for value, weight in zip(first, weights, strict=True))
    return torch.autograd.grad(total, [grad, *leaves], materialize_grads=True)


Draw = Callable[[], tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Tensor]]]
"""A function under test, its reference, and leaves for both."""


def assert_second_order(draw: Draw, draws: int = 2) -> None:
    """Within budget of the reference in float64, over draws: a second pass makes small differences of large sums."""
    assert_within_budget_over_draws((second_orders(*draw()) for _ in range(draws)), condition=4.0)


def second_orders(
    ours: Callable[..., Tensor], reference: Callable[..., Tensor], leaves: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Of ``ours``, and of ``reference`` in the same dtype and in float64."""
    values = list(leaves.values())
    grad = torch.randn_like(ours(*values))
    weights = [torch.randn_like(value) for value in values]
    doubles = [value.detach().double().requires_grad_() for value in values]
    got, same_dtype, exact = (
        dict(zip(["grad", *leaves], second_order(*call, weights), strict=True))
        for call in ((ours, values, grad), (reference, values, grad), (reference, doubles, grad.double()))
    )
    return got, same_dtype, exact


def on_backend(inputs: Inputs, backend: str) -> Callable[..., Tensor]:
    def layer(*tensors: Tensor) -> Tensor:
        arguments = dict(zip(inputs.tensors(), tensors, strict=True))
        return functional.spconv2d(**arguments, **inputs.window, backend=backend)

    return layer


@pytest.mark.parametrize("branch_bias", [False, True])
@pytest.mark.parametrize("case", TINY, ids=str)
def test_double_backward_of_the_layer(case: Case, branch_bias: bool, device: str) -> None:
    def draw() -> Any:
        inputs = make_inputs(case, device=device, branch_bias=branch_bias)
        return on_backend(inputs, "triton"), on_backend(inputs, "reference"), inputs.tensors()

    assert_second_order(draw)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_double_backward_of_the_branch(case: Case, device: str) -> None:
    def branch(inputs: Inputs, backend: str) -> Callable[..., Tensor]:
        return lambda *tensors: functional.representative_branch(*tensors, **inputs.window, backend=backend)

    def draw() -> Any:
        inputs = make_inputs(case, device=device)
        leaves = {
            "x3": inputs.x.detach()[:, : case.representative].clone().requires_grad_(),
            "weight_gwc": inputs.weight_gwc,
            "weight_pwc": inputs.weight_pwc,
        }
        return branch(inputs, "triton"), branch(inputs, "reference"), leaves

    assert_second_order(draw)


def test_double_backward_of_the_fusion(device: str) -> None:
    def fusion(backend: str) -> Callable[..., Tensor]:
        return lambda *maps: functional.gap_softmax_fusion(*maps, backend=backend)

    def draw() -> Any:
        leaves = {name: torch.randn(2, 5, 4, 3, device=device, requires_grad=True) for name in ("u3", "u1")}
        return fusion("triton"), fusion("reference"), leaves

    assert_second_order(draw)


@pytest.mark.parametrize("affine", [True, False], ids=("affine", "bare"))
def test_double_backward_of_the_batch_norms(affine: bool, device: str) -> None:
    case = Case("row", 2, 6, 4, (3, 4), kernel_size=(1, 3), stride=(1, 2), padding=(0, 1), alpha=0.67)

    def layer(inputs: Inputs, backend: str) -> Callable[..., Tensor]:
        def function(x: Tensor, gwc: Tensor, pwc: Tensor, redundant: Tensor, bias: Tensor, *norms: Tensor) -> Tensor:
            pairs = {"norm_representative": norms[:2], "norm_redundant": norms[2:]} if norms else {}
            options: dict[str, Any] = {**pairs, **inputs.window, "backend": backend, "eps": (1e-2, 1e-3)}
            return functional.spconv2d_batch_norm(x, gwc, pwc, redundant, bias, **options)[0]

        return function

    def draw() -> Any:
        inputs = make_inputs(case, device=device)
        norms = {f"norm{i}": torch.randn(4, device=device, requires_grad=True) for i in range(4)} if affine else {}
        return layer(inputs, "triton"), layer(inputs, "native"), {**inputs.tensors(), **norms}

    assert_second_order(draw, 6)


def arguments(case: Case, device: str) -> dict[str, tuple[Any, ...]]:
    """Of every forward operator, in float32."""
    inputs = make_inputs(case, device=device, branch_bias=True)
    tensors = [tensor.detach() for tensor in inputs.tensors().values()]
    x, gwc, pwc, redundant, bias, branch_bias = tensors
    window = (list(case.stride), list(case.padding), list(case.dilation), case.groups)
    y = torch.randn(case.batch, case.out_channels, *case.output_size(), device=device)
    norms = (bias, bias, bias, bias)
    return {
        "representative_branch": (x[:, : case.representative], gwc, pwc, *window),
        "gap_softmax_fusion": (y, y.flip(0).bfloat16()),
        "spconv2d": (x, gwc, pwc, redundant, bias, branch_bias, *window),
        "spconv2d_inference": (x, gwc, pwc, redundant, bias, branch_bias, bias, y, "relu", *window),
        "spconv2d_batch_norm": (x, gwc, pwc, redundant, bias, *norms, 1e-5, 1e-5, *window),
    }


# Which arguments a convolution's rule casts; biases and norms that may be float32 stay, they are no factors.
CAST = {
    "representative_branch": (0, 1, 2),
    "spconv2d": (0, 1, 2, 3, 4),
    "spconv2d_inference": (0, 1, 2, 3, 7),
    "spconv2d_batch_norm": (0, 1, 2, 3, 4),
}


@pytest.mark.parametrize("name", CAST)
def test_operators_cast_under_autocast_as_a_convolution_does(name: str, device: str) -> None:
    operator, given = getattr(OPERATORS, name), arguments(BY_NAME["tiny"], device)[name]
    cast = [value.bfloat16() if i in CAST[name] else value for i, value in enumerate(given)]
    expected = operator(*cast)
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(operator(*given), expected, rtol=0, atol=0)
    y = expected if isinstance(expected, Tensor) else expected[0]
    assert y.dtype == torch.bfloat16
    with torch.autocast(device, torch.bfloat16, enabled=False):
        torch.testing.assert_close(operator(*cast), expected, rtol=0, atol=0)


def test_fusion_promotes_under_autocast(device: str) -> None:
    u3, u1 = arguments(BY_NAME["tiny"], device)["gap_softmax_fusion"]
    with torch.autocast(device, torch.bfloat16):
        y, _ = OPERATORS.gap_softmax_fusion(u3, u1)
        by_function = functional.gap_softmax_fusion(u1, u3, backend="triton")
    assert y.dtype == by_function.dtype == torch.float32
    assert torch.equal(y, OPERATORS.gap_softmax_fusion(u3, u1.float())[0])


def test_autocast_differentiates(device: str) -> None:
    """Gradients come back in the dtype of the parameters."""
    given = arguments(BY_NAME["tiny"], device)["spconv2d"]
    leaves = [value.requires_grad_() for value in given[:6]]
    with torch.autocast(device, torch.bfloat16):
        y, *_ = OPERATORS.spconv2d(*leaves, *given[6:])
        y.float().square().sum().backward()  # within: the backward operator's arguments are in half precision already
    for leaf in leaves:
        assert leaf.grad.dtype == torch.float32
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()


def test_profiler_names_the_operators(device: str) -> None:
    ours, _ = pair(device, branch_norm=True)
    x = torch.randn(2, 8, 5, 4, device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours(x).sum().backward()
        ours.eval()(x).sum().backward()
    seen = {event.key for event in profile.key_averages()}
    for name in ("spconv2d", "spconv2d_batch_norm"):
        assert {f"spconv_triton::{name}", f"spconv_triton::{name}_backward"} <= seen
