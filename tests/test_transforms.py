"""torch.func, double backward and forward mode, in float64 against autograd and the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_network import CLASSES, images, small_network
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from spconv_triton import SPConv2d

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: SPConv2d(8, 4, 3, padding=1),
    "strided": lambda: SPConv2d(8, 4, 3, 2, 1),
    "alpha-1": lambda: SPConv2d(8, 4, 3, padding=1, alpha=1.0),
    "branch-norm": lambda: SPConv2d(8, 4, 3, padding=1, branch_norm=True),
}


def make(name: str, *, training: bool = False) -> tuple[nn.Module, Tensor]:
    """A layer of ``LAYERS`` or the converted network, in float64, and its input."""
    if name == "network":
        return small_network().double().train(training), images(3, dtype=torch.float64)
    return LAYERS[name]().double().train(training), torch.randn(3, 8, 5, 4, dtype=torch.float64)


def by_reference(module: nn.Module) -> nn.Module:
    """A copy whose layers are the paper's equations."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, SPConv2d):
            part.backend = "reference"
    return module


def loss_of(module: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    buffers = dict(module.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        state = {name: value.clone() for name, value in buffers.items()}  # norms in training update it in place
        return functional_call(module, (parameters, state), (x,)).square().mean()

    return loss


def detached(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


every_module = pytest.mark.parametrize("name", [*LAYERS, "network"])


@every_module
@pytest.mark.parametrize("training", [False, True], ids=("eval", "train"))
def test_grad_of_functional_call_is_autograds(name: str, training: bool) -> None:
    module, x = make(name, training=training)
    loss = loss_of(module)
    got, got_x = grad(loss, argnums=(0, 1))(detached(module), x)
    expected = torch.autograd.grad(loss(dict(module.named_parameters()), x), list(module.parameters()))
    for (key, value), judge in zip(got.items(), expected, strict=True):
        torch.testing.assert_close(value, judge, msg=lambda m, key=key: f"{key}: {m}")
    torch.testing.assert_close(got_x, grad(loss_of(by_reference(module)), argnums=1)(detached(module), x))


@every_module
@pytest.mark.parametrize("training", [False, True], ids=("eval", "train"))
@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
def test_batched_gradients_are_gradients(name: str, training: bool, way: str) -> None:
    module, x = make(name, training=training)
    x = x.detach().requires_grad_()
    y = module(x)
    inputs = (x, *module.parameters())

    def gradients(cotangent: Tensor, **options: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, inputs, cotangent, retain_graph=True, **options)

    cotangents = torch.randn(3, *y.shape, dtype=y.dtype)
    batched = vmap(gradients)(cotangents) if way == "vmap" else gradients(cotangents, is_grads_batched=True)
    for i, cotangent in enumerate(cotangents):
        for got, expected in zip(batched, gradients(cotangent), strict=True):
            torch.testing.assert_close(got[i], expected)


@every_module
def test_vmap_of_grad_gives_the_gradients_of_each_sample(name: str) -> None:
    module, x = make(name)
    loss, parameters = loss_of(module), detached(module)
    got = vmap(grad(lambda p, sample: loss(p, sample[None])), in_dims=(None, 0))(parameters, x)
    for i in range(x.shape[0]):
        expected = torch.autograd.grad(loss(dict(module.named_parameters()), x[i : i + 1]), list(module.parameters()))
        for (key, value), judge in zip(got.items(), expected, strict=True):
            torch.testing.assert_close(value[i], judge, msg=lambda m, key=key: f"{key}: {m}")


@every_module
def test_vmap_over_an_ensemble(name: str) -> None:
    made = [make(name) for _ in range(3)]
    x = made[0][1]
    parameters, buffers = stack_module_state([module for module, _ in made])
    got = vmap(lambda p, b: functional_call(made[0][0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([module(x) for module, _ in made]))


@every_module
def test_jvp_is_the_adjoint_of_vjp(name: str) -> None:
    """And the reference's: <v, J u> = <J^T v, u>, by x and by the parameters."""
    module, x = make(name)
    parameters = detached(module)

    def outputs(module: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        return lambda p, x: functional_call(module, p, (x,))

    direction = {key: torch.randn_like(value) for key, value in parameters.items()}, torch.randn_like(x)
    y, tangent = jvp(outputs(module), (parameters, x), direction)
    torch.testing.assert_close(tangent, jvp(outputs(by_reference(module)), (parameters, x), direction)[1])
    cotangent = torch.randn_like(y)
    by_parameters, by_x = vjp(outputs(module), parameters, x)[1](cotangent)
    adjoint = sum((by_parameters[key] * u).sum() for key, u in direction[0].items()) + (by_x * direction[1]).sum()
    torch.testing.assert_close((cotangent * tangent).sum(), adjoint)


@every_module
@pytest.mark.parametrize("grads", [True, False], ids=("grad", "no-grad"))
def test_dual_numbers(name: str, grads: bool) -> None:
    module, x = make(name)
    u = torch.randn_like(x)
    with forward_ad.dual_level(), torch.set_grad_enabled(grads):
        tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, u))).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, jvp(by_reference(module), (x,), (u,))[1])


def test_running_statistics_have_no_tangents() -> None:
    layer, x = SPConv2d(8, 8, 3, padding=1, branch_norm=True), torch.randn(2, 8, 5, 5)
    expected = copy.deepcopy(layer)
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, torch.randn_like(x)))
        assert forward_ad.unpack_dual(layer.eval()(x)).tangent is None
    expected(x)
    for name, statistic in expected.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), statistic)


def test_jacobians_and_hessians() -> None:
    module, x = make("network")
    rows, columns = (transform(lambda x: module(x))(x[:1]) for transform in (jacrev, jacfwd))
    assert rows.shape == (1, CLASSES, *x[:1].shape)
    torch.testing.assert_close(rows, columns)
    layer, _ = make("strided")
    point = torch.randn(1, 8, 3, 2, dtype=torch.float64)
    curvature = hessian(lambda x: layer(x).square().sum())(point)
    torch.testing.assert_close(curvature, hessian(lambda x: by_reference(layer)(x).square().sum())(point))


@every_module
def test_double_backward(name: str) -> None:
    module, x = make(name)
    names = [key for key, _ in module.named_parameters()]

    def outputs(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    leaves = (x.requires_grad_(), *(p.detach().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["layer", "branch-norm"])
def test_double_backward_in_training(name: str) -> None:
    module, x = make(name, training=True)
    assert torch.autograd.gradgradcheck(module, (x.requires_grad_(),), fast_mode=True)


def test_gradient_penalty_trains() -> None:
    """What double backward is for: a step on the norm of the input gradient makes it smaller."""
    module, x = make("network")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)

    def penalty() -> Tensor:
        point = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(module(point).sum(), point, create_graph=True)
        return slope.square().sum()

    before = penalty()
    before.backward()
    optimizer.step()
    assert penalty() < before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["strided", "branch-norm"])
def test_transforms_compile_in_one_graph(name: str) -> None:
    module, x = make(name)
    parameters = detached(module)

    def gradients(p: dict[str, Tensor], x: Tensor) -> Any:
        return grad(lambda p: functional_call(module, p, (x,)).square().mean())(p)

    torch._dynamo.reset()
    got = torch.compile(gradients, fullgraph=True, backend="aot_eager")(parameters, x)
    for key, value in gradients(parameters, x).items():
        torch.testing.assert_close(got[key], value)
