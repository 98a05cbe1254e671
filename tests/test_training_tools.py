"""What PyTorch offers around training: checkpointing, parametrizations, averages of weights, accumulated gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import kept_bytes
from small_network import CLASSES, images, small_network
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from spconv_triton import SPConv2d


def layer(*, branch_norm: bool = False) -> SPConv2d:
    return SPConv2d(8, 12, 3, 2, 1, branch_norm=branch_norm).double()


def gradients(module: nn.Module, y: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in module.named_parameters()]
    return dict(zip(names, torch.autograd.grad(y.square().sum(), list(module.parameters())), strict=True))


@pytest.mark.parametrize("reentrant", [False, True], ids=("non-reentrant", "reentrant"))
@pytest.mark.parametrize("branch_norm", [False, True])
def test_checkpointing_a_layer(reentrant: bool, branch_norm: bool) -> None:
    module = layer(branch_norm=branch_norm)
    x = torch.randn(3, 8, 7, 6, dtype=torch.float64, requires_grad=True)
    expected = module(x)
    y = checkpoint(module, x, use_reentrant=reentrant)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    for name, value in gradients(module, expected).items():
        assert torch.equal(module.get_parameter(name).grad, value), name


@pytest.mark.parametrize("reentrant", [False, True], ids=("non-reentrant", "reentrant"))
def test_checkpointing_a_converted_network(reentrant: bool) -> None:
    network = small_network().double()
    twin = copy.deepcopy(network)
    x = images(dtype=torch.float64).requires_grad_()

    def run() -> Tensor:
        return checkpoint_sequential(network, 3, x, use_reentrant=reentrant)

    y, expected = run(), twin(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    for name, value in gradients(twin, expected).items():
        torch.testing.assert_close(network.get_parameter(name).grad, value, msg=lambda m, name=name: f"{name}: {m}")
    if not reentrant:
        assert kept_bytes(run) < kept_bytes(lambda: twin(x))


WEIGHTS = ("weight_gwc", "weight_pwc", "weight_redundant")


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("branch_norm", [False, True])
def test_weight_norm(name: str, branch_norm: bool) -> None:
    """weight = g v / |v| by output channel: the layer computes with it, and both its factors learn."""
    module = layer(branch_norm=branch_norm)
    plain = copy.deepcopy(module).eval()
    parametrizations.weight_norm(module.eval(), name)
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(module(x), plain(x))
    factors = module.parametrizations[name]
    with torch.no_grad():
        factors.original0.mul_(2)
        getattr(plain, name).mul_(2)
    torch.testing.assert_close(module(x), plain(x))
    optimizer = torch.optim.SGD(module.train().parameters(), lr=0.1)
    before = [factor.detach().clone() for factor in factors.parameters()]
    module(x).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, factors.parameters(), strict=True))


def test_spectral_norm() -> None:
    module = layer()
    parametrizations.spectral_norm(module, "weight_gwc", n_power_iterations=50)
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    module(x).square().sum().backward()  # in training it iterates
    largest = torch.linalg.matrix_norm(module.eval().weight_gwc.flatten(1), ord=2)
    torch.testing.assert_close(largest, torch.ones_like(largest), rtol=1e-3, atol=0)
    assert module.parametrizations.weight_gwc.original.grad.any()
    with parametrize.cached():  # the weight once for all calls within
        y = module(x)
    plain = copy.deepcopy(module)
    parametrize.remove_parametrizations(plain, "weight_gwc")
    torch.testing.assert_close(plain(x), y)


def train(network: nn.Module, average: AveragedModel, steps: int) -> list[dict[str, Tensor]]:
    """The parameters after every step."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    passed = []
    for _ in range(steps):
        F.cross_entropy(network(images()), torch.randint(CLASSES, (4,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(network)
        passed.append({name: p.detach().clone() for name, p in network.named_parameters()})
    return passed


@pytest.mark.parametrize("branch_norm", [False, True])
def test_averaged_weights_and_update_bn(branch_norm: bool) -> None:
    """SWA: the mean of the weights passed through, and statistics of the norms, branches' too, made for it."""
    network = small_network(branch_norm=branch_norm)
    average = AveragedModel(network)
    passed = train(network, average, 3)
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p, torch.stack([weights[name] for weights in passed]).mean(0))
    batches = [images() for _ in range(3)]
    judge = copy.deepcopy(average.module)
    update_bn(batches, average)
    norms = {name: m for name, m in judge.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == (6 if branch_norm else 2)
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # the average over all batches
    with torch.no_grad():
        for batch in batches:
            judge.train()(batch)
    for name, norm in norms.items():
        torch.testing.assert_close(average.module.get_submodule(name).running_mean, norm.running_mean)
        torch.testing.assert_close(average.module.get_submodule(name).running_var, norm.running_var)
    x = images()
    torch.testing.assert_close(average.eval()(x), judge.eval()(x))


def test_exponential_average_follows_buffers_too() -> None:
    network = small_network(branch_norm=True)
    first = {name: value.clone() for name, value in network.state_dict().items()}
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    train(network, average, 1)
    train(network, average, 1)
    for name, value in average.module.state_dict().items():
        assert not value.is_floating_point() or not torch.equal(value, first[name]), f"{name} stayed"
        assert not value.is_floating_point() or value.isfinite().all(), name
    assert average.eval()(images()).shape == (4, CLASSES)


@pytest.mark.parametrize("name", ["layer", "network"])
def test_accumulated_gradients_are_those_of_the_whole_batch(name: str) -> None:
    """The gate is every sample's own. (Batch norms in training see the batch: here they are in eval.)"""
    if name == "layer":
        module, x = layer(), torch.randn(6, 8, 7, 6, dtype=torch.float64)
    else:
        module, x = small_network().double().eval(), images(6, dtype=torch.float64)
    whole = gradients(module, module(x))
    for part in (x[:1], x[1:4], x[4:]):
        module(part).square().sum().backward()
    for key, p in module.named_parameters():
        torch.testing.assert_close(p.grad, whole[key], msg=lambda m, key=key: f"{key}: {m}")
