"""A layer under torch.compile and torch.export: whole graphs, any size, and no operation that Inductor cannot see."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
from cases import assert_within_budget, run, yardsticks
from layer_cases import inputs_of, make
from torch import Tensor, nn

from spconv_triton import SPConv2d, reference


def outputs(layer: nn.Module, x: Tensor, grad: Tensor, *, dynamic: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Output and gradients by name, with the sizes of the ``dynamic`` axes of ``x`` marked for Dynamo."""
    x = x.detach().requires_grad_()
    for axis in dynamic:
        torch._dynamo.mark_dynamic(x, axis)
    y = layer(x)
    parameters = {name.removeprefix("_orig_mod."): p for name, p in layer.named_parameters()}
    grads = torch.autograd.grad(y, [x, *parameters.values()], grad)
    return {"y": y.detach(), **dict(zip(["x", *parameters], grads, strict=True))}


def assert_outputs_within_budget(got: dict[str, Tensor], layer: SPConv2d, x: Tensor, grad: Tensor) -> None:
    judge = copy.deepcopy(layer)
    judge.backend = "reference"
    layouts = torch.contiguous_format, torch.channels_last
    same_dtype = [outputs(judge.to(memory_format=f), *(t.to(memory_format=f) for t in (x, grad))) for f in layouts]
    exact = outputs(judge.double(), x.double(), grad.double())
    allowed = yardsticks(same_dtype, exact)
    for name, value in got.items():
        assert_within_budget(name, value, allowed[name], exact[name])


CONVOLUTION = r"= (?:extern_kernels\.convolution|torch\.ops\.\w+\.\w*convolution\w*(?:\.\w+)?)\("
"""A call of one, in Inductor's code."""


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_sees_every_operation_of_inference() -> None:
    """It lowers the ATen path itself, three convolutions, so it can fuse across the layer."""
    from torch._inductor.utils import run_and_get_code

    layer = make({"kernel_size": 3, "padding": 1})
    x = torch.randn(2, 8, 9, 7).contiguous(memory_format=torch.channels_last)
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        got, sources = run_and_get_code(torch.compile(layer, fullgraph=True), x)
        judge = make({"kernel_size": 3, "padding": 1}, backend="reference")
        judge.load_state_dict(layer.state_dict())
        assert_within_budget("y", got, judge(x), judge.double()(x.double()))
    (source,) = sources
    assert len(re.findall(CONVOLUTION, source)) == 3
    assert ".spconv_triton." not in source


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_sees_every_operation_of_training() -> None:
    """Three convolutions forward and backward, and no operator of ours."""
    from torch._inductor.utils import run_and_get_code

    layer = make({"kernel_size": 3, "stride": 2, "padding": 1})
    x = torch.randn(2, 8, 9, 7).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, 12, 5, 4)
    with torch._inductor.config.patch(force_disable_caches=True):
        got, sources = run_and_get_code(outputs, torch.compile(layer, fullgraph=True), x, grad)
    assert_outputs_within_budget(got, layer, x, grad)
    forward, backward = sources
    assert len(re.findall(CONVOLUTION, forward)) == 3
    assert len(re.findall(r"= torch\.ops\.aten\.convolution_backward\.default\(", backward)) == 3
    assert not any(".spconv_triton." in source for source in sources)


class CountedGraphs:
    """A Dynamo backend that counts what it is given, and lowers through autograd as Inductor's frontend does.

    Not Inductor: on a CPU it makes the sizes of any convolution static, nn.Conv2d's too.
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        self.count += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)


SIZES = [(2, 9, 7), (3, 8, 6), (5, 12, 11), (4, 7, 16)]


def assert_sizes_agree(
    layer: SPConv2d, compiled: Any, sizes: list[tuple[int, int, int]], *, dynamic: tuple[int, ...] = ()
) -> None:
    for n, height, width in sizes:
        x = torch.randn(n, 8, height, width)
        grad = torch.randn_like(layer(x))
        assert_outputs_within_budget(outputs(compiled, x, grad, dynamic=dynamic), layer, x, grad)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("stride", [1, 2])
def test_one_graph_serves_every_size(stride: int) -> None:
    layer, graphs = SPConv2d(8, 12, 3, stride, 1), CountedGraphs()
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_sizes_agree(layer, compiled, SIZES, dynamic=(0, 2, 3))
    assert graphs.count == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_sizes_become_dynamic_by_themselves() -> None:
    """The second size makes the graph dynamic; no later one compiles."""
    layer, graphs = SPConv2d(8, 12, 3, padding=1, branch_norm=True).eval(), CountedGraphs()
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)
    assert_sizes_agree(layer, compiled, SIZES[:2])
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_sizes_agree(layer, compiled, SIZES[2:])
    assert graphs.count == 2


def test_exports() -> None:
    layer = make({"kernel_size": 3, "stride": 2, "padding": 1}).eval()
    x = torch.randn(2, 8, 9, 7)
    program = torch.export.export(layer, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    inputs = inputs_of(layer, x)
    same_dtype, exact = (run(reference.spconv2d, i)["y"] for i in (inputs, inputs.to(torch.float64)))
    assert_within_budget("y", torch.export.load(file).module()(x), same_dtype, exact)


@pytest.mark.parametrize("options", [{}, {"branch_norm": True}, {"alpha": 1.0}], ids=str)
def test_compiled_autograd_takes_the_backward_whole(options: dict[str, Any]) -> None:
    layer, x = SPConv2d(8, 8, 3, padding=1, **options), torch.randn(2, 8, 6, 6)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        layer(x).square().sum().backward()
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-3)
