"""torch.export: any batch and resolution, saved, loaded, and only operators of ATen inside."""

from __future__ import annotations

import io
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_network import small_network
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from spconv_triton import SPConv2d, fuse

pytestmark = pytest.mark.filterwarnings("ignore")  # of what torch.export itself calls

MODULES: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: SPConv2d(8, 12, 3, padding=1),
    "stride-2": lambda: SPConv2d(8, 12, 3, 2, 1),
    "shifted": lambda: SPConv2d(8, 12, 3, (2, 3), (0, 2)),
    "alpha-1": lambda: SPConv2d(8, 12, 3, 2, 1, alpha=1.0),
    "network": lambda: small_network(branch_norm=True),
    "fused": lambda: fuse(small_network(branch_norm=True).eval()),
}
SIZES = ((3, 12, 11), (2, 9, 16), (5, 8, 8))
NAMED = {0: Dim("batch"), 2: Dim("height", min=5), 3: Dim("width", min=5)}


def channels(name: str) -> int:
    return 3 if name.startswith(("network", "fused")) else 8


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def assert_agrees(exported: Any, module: nn.Module, name: str) -> None:
    for batch, *size in SIZES:
        x = torch.randn(batch, channels(name), *size)
        torch.testing.assert_close(exported(x), module(x))


@torch.no_grad()
@pytest.mark.parametrize("name", MODULES)
def test_round_trip_with_any_batch_and_size(name: str) -> None:
    module = MODULES[name]().eval()
    x = torch.randn(2, channels(name), 10, 7)
    program = torch.export.export(module, (x,), dynamic_shapes=(NAMED,))
    loaded = saved_and_loaded(program)
    assert_agrees(loaded.module(), module, name)
    called = {node.target for node in loaded.graph.nodes if node.op == "call_function"}
    ours = {str(target) for target in called if isinstance(target, torch._ops.OpOverload)}
    assert {target.split(".")[0] for target in ours} == {"aten"}, ours
    others = called - {target for target in called if isinstance(target, torch._ops.OpOverload)}
    assert others <= {operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv}, others


@torch.no_grad()
def test_strict_mode() -> None:
    module = MODULES["stride-2"]().eval()
    program = torch.export.export(module, (torch.randn(2, 8, 10, 7),), dynamic_shapes=(NAMED,), strict=True)
    assert_agrees(program.module(), module, "stride-2")


def test_an_exported_network_trains() -> None:
    """Exported in training mode, its gradients are the module's, and its norms track."""
    network = small_network()
    x = torch.randn(4, 3, 10, 7)
    exported = torch.export.export(network, (x,), dynamic_shapes=(NAMED,)).module()
    y = torch.randn(5, 3, 8, 9)
    got, expected = exported(y), network(y)
    torch.testing.assert_close(got, expected)
    parameters = dict(exported.named_parameters())
    for name, p in network.named_parameters():
        pair = (
            torch.autograd.grad(z.square().sum(), q, retain_graph=True)[0]
            for z, q in ((got, parameters[name]), (expected, p))
        )
        torch.testing.assert_close(*pair, msg=lambda m, name=name: f"{name}: {m}")
    for name, value in network.named_buffers():
        torch.testing.assert_close(exported.get_buffer(name), value)


class Autocast(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.module(x)


@torch.no_grad()
def test_decomposed_to_core_aten_with_autocast_inside() -> None:
    module = Autocast(SPConv2d(8, 12, 3, 2, 1)).eval()
    program = torch.export.export(module, (torch.randn(2, 8, 10, 7),)).run_decompositions()
    x = torch.randn(2, 8, 10, 7)
    got, expected = saved_and_loaded(program).module()(x), module(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    # Decomposed, sums are rounded to bfloat16 that the layer keeps in float32.
    torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=0.02 * expected.abs().max().item())
