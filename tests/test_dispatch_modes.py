"""What sees every operation of a layer in eager mode: selective checkpoints, fakes, ``make_fx``, ``DTensor``."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pins import is_pinned
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


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """Of this process alone."""
    distributed = pytest.importorskip("torch.distributed")
    tensors = pytest.importorskip("torch.distributed.tensor")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield tensors.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@every_layer
def test_distributed_tensors(options: dict[str, Any], mesh: Any) -> None:
    """They take every operation themselves, and have neither views by strides nor oneDNN's operators."""
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    plain, x = layer(64, **options), maps(64)
    distributed = distribute_module(copy.deepcopy(plain), mesh)
    given = distribute_tensor(x, mesh, [Shard(0)])
    try:  # PyTorch 2.11's lacks both
        dense = distribute_tensor(torch.randn(64, 64, 3, 3), mesh, [Replicate()])
        torch.nn.functional.conv2d(given, dense, stride=plain.stride, padding=1)
        if plain.branch_norm:
            torch.var_mean(given, (0, 2, 3))
    except (NotImplementedError, RuntimeError) as error:
        if is_pinned("torch"):
            raise
        pytest.skip(f"nor does nn.Conv2d or its norm take them here: {error}")
    y, expected = distributed(given), plain(x)
    torch.testing.assert_close(y.full_tensor(), expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for got, parameter in zip(distributed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad.full_tensor(), parameter.grad, rtol=1e-4, atol=1e-3)
    distributed.eval()
    plain.eval()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(distributed(given).full_tensor(), plain(x))
