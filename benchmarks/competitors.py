"""What is timed: one set-up for every way to measure. Nothing is handed out whose result is wrong."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from cases import Case, assert_within_budget
from torch import Tensor, nn

from spconv_triton import SPConv2d, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
NAMES = ("conv2d", "reference", "native", *(["triton"] if DEVICE == "cuda" else []))
DIRECTIONS = ("forward", "forward+backward")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Competitor:
    """A call to time, ready to run.

    Attributes:
        call: returns once the work is done, on a GPU too.
        layout: of input and weights, the faster of the two for this competitor.
        macs: multiply-accumulates of one call; a backward counts as two forwards.
    """

    name: str
    call: Callable[[], object]
    layout: str
    macs: int


def build(case: Case, name: str, direction: str) -> Competitor:
    """``name`` in the faster of the two memory formats, checked against float64.

    Raises:
        AssertionError: its output or a gradient is outside the error budget.
    """
    torch.manual_seed(0)
    if name == "conv2d":
        layer: nn.Module = nn.Conv2d(
            case.in_channels, case.out_channels, case.kernel_size, case.stride, case.padding, case.dilation, bias=False
        )
    else:
        layer = SPConv2d(
            case.in_channels,
            case.out_channels,
            case.kernel_size,
            case.stride,
            case.padding,
            case.dilation,
            case.groups,
            bias=False,
            alpha=case.alpha,
            backend=name,
        )
    layer = layer.to(DEVICE, DTYPE)
    x = torch.randn(case.batch, case.in_channels, *case.size).to(DEVICE, DTYPE)
    grad = torch.randn(case.batch, case.out_channels, *case.output_size()).to(DEVICE, DTYPE)
    worst, exact = _yardsticks(layer, case, x, grad, direction)
    names = ["y", "x", *(name for name, _ in layer.named_parameters())]
    calls: dict[str, Callable[[], Sequence[Tensor]]] = {}
    for layout, memory_format in LAYOUTS.items():
        # A layer of its own: nn.Module.to moves parameters in place.
        twin = copy.deepcopy(layer).to(memory_format=memory_format)
        like = [t.contiguous(memory_format=memory_format) for t in (x, grad)]
        calls[layout] = functools.partial(_run, twin, *like, direction)
        for i, result in enumerate(calls[layout]()):
            assert_within_budget(f"{case}, {name}, {layout}: {names[i]}", result, worst[i], exact[i])
    layout = min(calls, key=lambda layout: _quick(calls[layout]))
    return Competitor(name, functools.partial(_wait_for, calls[layout]), layout, count_macs(case, name, direction))


def count_macs(case: Case, name: str, direction: str) -> int:
    """Of the convolutions; the gate is not counted."""
    height, width = case.output_size()
    taps = case.kernel_size[0] * case.kernel_size[1]
    per_output = case.in_channels * taps
    if name != "conv2d":
        per_output = taps * case.representative // case.groups + case.in_channels
    forward = case.batch * height * width * case.out_channels * per_output
    return forward if direction == "forward" else 3 * forward


def with_batch(case: Case, batch: int) -> Case:
    return replace(case, batch=batch)


def _run(layer: nn.Module, x: Tensor, grad: Tensor, direction: str) -> Sequence[Tensor]:
    """Output, and gradients of the input and the parameters."""
    if direction == "forward":
        with torch.no_grad():
            return [layer(x)]
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad)]


def _wait_for(call: Callable[[], object]) -> object:
    result = call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return result


def _quick(call: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls: enough to choose a layout by, not to report."""
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        _wait_for(call)
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


def _yardsticks(
    layer: nn.Module, case: Case, x: Tensor, grad: Tensor, direction: str
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Output and gradients of eager PyTorch in the dtype of ``x``, in whichever layout each errs more, and in float64.

    The convolutions behind the two layouts differ by up to ten times in their float32 errors. nn.Conv2d, being eager
    PyTorch, can fail its own budget only by values that are not finite.
    """
    eager = layer if isinstance(layer, nn.Conv2d) else _Equations(layer, case)
    exact = _run(copy.deepcopy(eager).double(), x.double(), grad.double(), direction)
    same_dtype = [
        _run(
            copy.deepcopy(eager).to(memory_format=memory_format),
            *(t.contiguous(memory_format=memory_format) for t in (x, grad)),
            direction,
        )
        for memory_format in LAYOUTS.values()
    ]

    def worse(results: Sequence[Tensor], judge: Tensor) -> Tensor:
        return max(results, key=lambda r: (r.double() - judge).abs().max().item())

    return [worse(results, judge) for *results, judge in zip(*same_dtype, exact, strict=True)], exact


class _Equations(nn.Module):
    """The paper's equations, from the library's reference."""

    def __init__(self, layer: nn.Module, case: Case) -> None:
        super().__init__()
        for name, p in layer.named_parameters():
            self.register_parameter(name, nn.Parameter(p.detach().clone()))
        self.case = case

    def forward(self, x: Tensor) -> Tensor:
        return reference.spconv2d(x, self.weight_gwc, self.weight_pwc, self.weight_redundant, **self.case.window)
