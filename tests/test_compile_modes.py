"""torch.compile in every mode: Inductor compiles and runs it; tests/test_modules_compiled.py counts graphs over sizes.

On a CPU the modes differ in what they tune; CUDA graphs, which ``reduce-overhead`` adds, need a GPU.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import assert_within_budget
from small_network import images, small_network
from torch import Tensor, nn
from torch._dynamo.utils import counters

from spconv_triton import SPConv2d

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore"),  # Inductor's own
]

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def results(module: nn.Module, x: Tensor, parameters: nn.Module | None = None) -> dict[str, Tensor]:
    """Output and every gradient; ``parameters`` has them where ``module`` is its compiled form."""
    y = module(x)
    owner = parameters or module
    names, leaves = zip(*owner.named_parameters(), strict=True)
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y.square().sum(), leaves), strict=True))}


def assert_agrees(compiled: nn.Module, module: nn.Module, x: Tensor) -> None:
    """Output, gradients and tracked statistics, within budget of float64."""
    double, same_dtype = copy.deepcopy(module).double(), copy.deepcopy(module)
    got = results(compiled, x, module)
    near, exact = results(same_dtype, x), results(double, x.double())
    for name, value in got.items():
        assert_within_budget(name, value, near[name], exact[name], condition=16.0)  # sums of one term after the other
    for name, value in module.named_buffers():
        torch.testing.assert_close(value, same_dtype.get_buffer(name), msg=name)


@pytest.mark.slow
@pytest.mark.drawn(2, "mode", MODES)
def test_every_mode(mode: str) -> None:
    """A layer at a stride with norms in its branches, forward and backward, in one graph."""
    layer = SPConv2d(8, 12, 3, 2, 1, branch_norm=True)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    x = torch.randn(3, 8, 9, 7)
    assert_agrees(compiled, layer, x)


@pytest.mark.slow
@pytest.mark.drawn(1, "training", [True, False])
def test_network_of_any_batch_and_size_compiles_twice(training: bool) -> None:
    """Once as it comes, once with symbols; whatever batch and resolution follow recompile nothing."""
    network = small_network().train(training)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert_agrees(compiled, network, images(2))
    assert_agrees(compiled, network, images(3, (11, 14)))
    assert counters["stats"]["unique_graphs"] == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, size in ((4, (8, 8)), (7, (16, 9)), (5, (13, 13))):
            assert_agrees(compiled, network, images(batch, size))
    assert counters["stats"]["unique_graphs"] == 2


def test_inductor_runs_any_batch_with_one_graph() -> None:
    layer = SPConv2d(8, 12, 3, padding=1).eval()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 5, 3):
            x = torch.randn(batch, 8, 6, 7)
            torch._dynamo.mark_dynamic(x, 0)
            with torch._dynamo.config.patch(error_on_recompile=batch != 2):
                torch.testing.assert_close(compiled(x), layer(x))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_weights_may_be_frozen() -> None:
    """Inductor then folds what it can of them into constants, in oneDNN's order."""
    network = small_network().eval().to(memory_format=torch.channels_last)
    x = images(2).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        torch.testing.assert_close(torch.compile(network, fullgraph=True)(x), network(x), rtol=1e-4, atol=1e-4)


def test_autocast_and_dtype_are_guarded() -> None:
    """A graph made outside autocast is not run inside it, nor one for float32 on float64."""
    layer = SPConv2d(8, 12, 3, 2, 1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 6, 7)
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = compiled(x), layer(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), layer(x), rtol=0, atol=0.05 * expected.abs().max().item())
    torch.testing.assert_close(compiled(x), layer(x))
    layer.double()
    torch.testing.assert_close(compiled(x.double()), layer(x.double()))
