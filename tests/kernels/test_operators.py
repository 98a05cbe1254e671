"""The operators as PyTorch sees them: schema, fakes with true strides, autograd, compilation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import BY_NAME, Case, make_inputs, run
from torch.utils.flop_counter import FlopCounterMode

from spconv_triton import SPConv2d, functional
from spconv_triton.launch import opaque

BRANCH = torch.ops.spconv_triton.representative_branch.default
BRANCH_BACKWARD = torch.ops.spconv_triton.representative_branch_backward.default
LAYER = torch.ops.spconv_triton.spconv2d.default
LAYER_BACKWARD = torch.ops.spconv_triton.spconv2d_backward.default
FUSION = torch.ops.spconv_triton.gap_softmax_fusion.default
FUSION_BACKWARD = torch.ops.spconv_triton.gap_softmax_fusion_backward.default


# Few taps, for every check of an operator runs it, and the interpreter is slow.
ROW = Case("row", 1, 10, 6, (2, 3), kernel_size=(1, 3), padding=(0, 1), alpha=0.6)
STRIDED_ROW = Case("row-stride-2", 2, 6, 4, (2, 4), kernel_size=(1, 3), stride=(1, 2), padding=(0, 1), alpha=0.67)


def branch_arguments(case: Case, device: str, memory_format: torch.memory_format) -> tuple[Any, ...]:
    inputs = make_inputs(case, device=device, memory_format=memory_format)
    x3 = inputs.x.detach()[:, : case.representative].requires_grad_()
    window = (case.stride, case.padding, case.dilation, case.groups)
    return x3, inputs.weight_gwc, inputs.weight_pwc, *map(list, window[:3]), case.groups


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("case", [ROW, STRIDED_ROW], ids=str)
def test_branch_passes_opcheck(case: Case, memory_format: torch.memory_format, device: str) -> None:
    arguments = branch_arguments(case, device, memory_format)
    torch.library.opcheck(BRANCH, arguments)
    grad = torch.randn((case.batch, case.out_channels, *case.output_size()), device=device)
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(BRANCH_BACKWARD, (grad, *detached))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("case", "memory_format"),
    [(ROW, torch.channels_last), (STRIDED_ROW, torch.contiguous_format)],
    ids=str,
)
def test_layer_passes_opcheck(case: Case, memory_format: torch.memory_format, bias: bool, device: str) -> None:
    inputs = make_inputs(case, device=device, memory_format=memory_format, bias=bias, branch_bias=bias)
    window = (*map(list, (case.stride, case.padding, case.dilation)), case.groups)
    torch.library.opcheck(LAYER, (*inputs.positional(), inputs.branch_bias, *window))
    detached = [value if value is None else value.detach() for value in inputs.positional()[:4]]
    branch_bias = None if inputs.branch_bias is None else inputs.branch_bias.detach()
    y, *kept = LAYER(*detached, None, branch_bias, *window)
    torch.library.opcheck(LAYER_BACKWARD, (torch.randn_like(y), *detached, branch_bias, *kept, *window))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fusion_passes_opcheck(memory_format: torch.memory_format, device: str) -> None:
    u3, u1, grad = (torch.randn(2, 12, 5, 6, device=device).contiguous(memory_format=memory_format) for _ in range(3))
    torch.library.opcheck(FUSION, (u3.requires_grad_(), u1.requires_grad_()))
    gate = torch.randn(2, 12, device=device)
    torch.library.opcheck(FUSION_BACKWARD, (grad, u3.detach(), u1.detach(), gate))


def test_compiled_layer_equals_eager_at_any_batch_and_size(device: str) -> None:
    layer = SPConv2d(4, 4, 3, padding=1, backend="triton", device=device)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 4, 6, 7), (3, 4, 5, 3), (5, 4, 6, 6)):
        x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        with torch._dynamo.config.patch(error_on_recompile=shape[0] > 2):
            y = compiled(x)
        expected = layer(x)
        assert torch.equal(y, expected)
        grads = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        expected_grads = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad)


def test_flops_are_counted(device: str) -> None:
    case = BY_NAME["plain"]
    inputs = make_inputs(case, device=device)
    with FlopCounterMode(display=False) as counter:
        run(functional.spconv2d, inputs, backend="triton")
    height, width = case.output_size()
    weights = sum(w.numel() for w in (inputs.weight_gwc, inputs.weight_pwc, inputs.weight_redundant))
    assert counter.get_total_flops() == 2 * weights * case.batch * height * width


def test_an_opaque_operator_launches_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current one, and not every compiler's code makes that theirs."""
    current: list[torch.Tensor | None] = [None]

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    operator = opaque.convolve
    monkeypatch.setattr(operator, "body", lambda *args: current[-1])
    x, other = torch.ones(1), torch.ones(2)
    assert operator._run(x, other) is x
    assert current == [None]
