"""What sees every operation of a layer in eager mode: selective checkpointing, fake tensors, ``make_fx``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from spconv_triton import SPConv2d

OPTIONS: tuple[dict[str, Any], ...] = ({}, {"stride": 2}, {"alpha": 1.0}, {"branch_norm": True})
every_layer = pytest.mark.parametrize("options", OPTIONS, ids=str)
every_channels = pytest.mark.parametrize("channels", [16, 64])  # the weights are merged where channels are few


def layer(channels: int, **options: Any) -> SPConv2d:
    return SPConv2d(channels, channels, 3, padding=1, **options)


def maps(channels: int) -> Tensor:
    return torch.randn(4, channels, 12, 11)


def results(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output of ``run`` and gradients."""
    leaves = {"x": x.detach().requires_grad_(), **dict(module.named_parameters())}
    y = run(leaves["x"])
    gradients = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def saves_products(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    is_product = any(part in str(operation) for part in ("conv", "mm", "lerp", "linear"))
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


@every_layer
@every_channels
@pytest.mark.parametrize("mutation", [False, True])
def test_selective_checkpointing_keeps_what_it_says(channels: int, options: dict[str, Any], mutation: bool) -> None:
    """What it has kept is not written over: at worst gradients would be wrong in silence."""
    contexts = functools.partial(
        create_selective_checkpoint_contexts, saves_products, allow_cache_entry_mutation=mutation
    )
    module, x = layer(channels, **options).double(), maps(channels).double()
    got = results(lambda x: checkpoint(module, x, use_reentrant=False, context_fn=contexts), module, x)
    for name, value in results(module, module, x).items():
        torch.testing.assert_close(got[name], value, msg=lambda m, name=name: f"{name}: {m}")


@every_layer
@every_channels
def test_fake_tensors_train(channels: int, options: dict[str, Any]) -> None:
    with FakeTensorMode():
        module, x = layer(channels, **options), maps(channels)
        found = results(module, module, x)
    assert {name: value.shape for name, value in found.items()} == {
        "x": x.shape,
        "y": (4, channels, *((6, 6) if "stride" in options else (12, 11))),
        **{name: p.shape for name, p in module.named_parameters()},
    }


@every_layer
@every_channels
@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_a_captured_graph_runs_and_trains(channels: int, options: dict[str, Any], tracing: str) -> None:
    """Its weights among the inputs, as symbols too."""
    module = layer(channels, **options).double()
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    x = maps(channels).double()

    def call(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, state, (x,))

    graph = make_fx(call, tracing_mode=tracing)(state, x)
    got = results(lambda x: graph(state, x), module, x)
    for name, value in results(module, module, x).items():
        torch.testing.assert_close(got[name], value, msg=lambda m, name=name: f"{name}: {m}")
