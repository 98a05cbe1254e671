"""What is timed: one set-up for every way to measure. Nothing is handed out whose result is wrong."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import torch
from cases import Case, assert_within_budget
from torch import Tensor, nn

import spconv_triton
from benchmarks.allocator import settle
from benchmarks.peers.catalogue import COMPILED, KEPT, without_variant
from benchmarks.turns import fastest
from spconv_triton import SPConv2d, functional, reference
from spconv_triton.dispatch import HAS_TRITON

if HAS_TRITON:
    from spconv_triton import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
NAMES = ("conv2d", "reference", "native", *(["triton"] if DEVICE == "cuda" else []))
DIRECTIONS = ("forward", "forward+backward")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

TF32_ROUNDING = 2.0**13
"""A rounding to TF32, in roundings to float32."""


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


@dataclass(frozen=True)
class Contestant:
    """A layer in one memory format whose results have been found right, and what it is run on."""

    name: str
    layout: str
    module: nn.Module
    x: Tensor
    grad: Tensor
    path: str = "auto"

    def call(self, direction: str) -> Callable[[], Sequence[Tensor]]:
        """``"forward"`` is inference, ``"backward"`` the gradients of a forward that has run, ``"forward+backward"``
        both, and ``"step"`` both with an optimizer's step, which changes no weight: its learning rate is 0.

        On a GPU it returns before the work is done.
        """
        call = self._call(direction)
        if self.name.endswith(KEPT):
            return _within(lambda: spconv_triton.set_recompute(False), call)
        return call if self.path == "auto" else _within(lambda: forced(self.path), call)

    def _call(self, direction: str) -> Callable[[], Sequence[Tensor]]:
        if direction in DIRECTIONS:
            return functools.partial(_run, self.module, self.x, self.grad, direction)
        x = self.x.detach().requires_grad_()
        weights = list(self.module.parameters())
        if direction == "backward":
            y = self.module(x)
            return functools.partial(torch.autograd.grad, y, [x, *weights], self.grad, retain_graph=True)
        optimizer = torch.optim.SGD(weights, lr=0.0, momentum=0.9)

        def step() -> Sequence[Tensor]:
            x.grad = None
            optimizer.zero_grad()
            y = self.module(x)
            y.backward(self.grad)
            optimizer.step()
            return [y]

        return step


def _within(
    context: Callable[[], contextlib.AbstractContextManager[None]], call: Callable[[], Sequence[Tensor]]
) -> Callable[[], Sequence[Tensor]]:
    def call_within() -> Sequence[Tensor]:
        with context():
            return call()

    return call_within


class Trial:
    """A dense or a split layer, one input and upstream gradient for all who compute it, and the right results.

    Args:
        dense: whether the layer is ``nn.Conv2d``.
        direction: of :data:`DIRECTIONS`; what is compared.
    """

    def __init__(
        self,
        case: Case,
        *,
        dense: bool,
        direction: str = "forward+backward",
        device: str = DEVICE,
        dtype: torch.dtype = DTYPE,
    ) -> None:
        torch.manual_seed(0)
        window = (case.in_channels, case.out_channels, case.kernel_size, case.stride, case.padding, case.dilation)
        layer: nn.Module
        if dense:
            layer = nn.Conv2d(*window, bias=False)
        else:
            layer = SPConv2d(*window, case.groups, bias=False, alpha=case.alpha)
        self.case = case
        self.direction = direction
        self.layer = layer.to(device, dtype)
        self.x = torch.randn(case.batch, case.in_channels, *case.size).to(device, dtype)
        self.grad = torch.randn(case.batch, case.out_channels, *case.output_size()).to(device, dtype)
        with _unsearched():
            self.worst, self.exact = _yardsticks(self.layer, case, self.x, self.grad, direction)

    def contestant(self, name: str, layout: str) -> Contestant:
        """``name`` in ``layout``, compared with float64.

        Args:
            name: ``"conv2d"`` where the layer is dense; else a backend of SPConv2d, ``"separate"`` for a kernel an
                equation with U3 and U1 in memory, or ``"flat"`` for the kernels that any GPU gets. Behind any of them
                one of :data:`~benchmarks.peers.catalogue.VARIANTS`.

        Raises:
            AssertionError: its output or a gradient is outside the error budget.
        """
        memory_format = LAYOUTS[layout]
        # A layer of its own: nn.Module.to moves parameters in place.
        module = copy.deepcopy(self.layer).to(memory_format=memory_format).train(self.direction != DIRECTIONS[0])
        base = without_variant(name)
        if isinstance(module, SPConv2d):
            module.backend = "triton" if base in ("separate", "flat") else base
            module = Separate(module) if base == "separate" else module
        if name.endswith(COMPILED):
            module = torch.compile(module, fullgraph=True)
        x, grad = (t.contiguous(memory_format=memory_format) for t in (self.x, self.grad))
        contestant = Contestant(name, layout, module, x, grad, "flat" if base == "flat" else "auto")
        results = contestant.call(self.direction)()
        names = ["y", "x", *(name for name, _ in self.layer.named_parameters())]
        condition = self._condition(name)
        for i, result in enumerate(results):
            label = f"{self.case}, {name}, {layout}: {names[i]}"
            assert_within_budget(label, result, self.worst[i], self.exact[i], condition=condition)
        return contestant

    def _condition(self, name: str) -> float:
        """How many roundings more than the yardstick's own error a result may be off by."""
        # cuDNN may multiply some layers as float32 all the same, and would be too good a yardstick.
        if self.x.is_cuda and self.x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32":
            return TF32_ROUNDING
        # It is eager PyTorch that others are measured by; how it sums is cuDNN's choice of the day, or Inductor's.
        return 16.0 if name in ("conv2d", "reference") or name.endswith(COMPILED) else 1.0


def build(case: Case, name: str, direction: str) -> Competitor:
    """``name`` in the faster of the two memory formats, checked against float64.

    Raises:
        AssertionError: its output or a gradient is outside the error budget.
    """
    settle()
    trial = Trial(case, dense=without_variant(name) == "conv2d", direction=direction)
    calls = {layout: functools.partial(wait_for, trial.contestant(name, layout).call(direction)) for layout in LAYOUTS}
    for call in calls.values():
        for _ in range(2):  # the first calls compile, and build what oneDNN keeps
            call()
    layout = fastest(calls)
    return Competitor(name, calls[layout], layout, count_macs(case, name, direction))


def count_macs(case: Case, name: str, direction: str) -> int:
    """Of the equations' convolutions, padding included, as publications count; the gate is not counted.

    Any direction but ``"forward"`` has the two gradients' products as well.
    """
    height, width = case.output_size()
    taps = case.kernel_size[0] * case.kernel_size[1]
    per_output = case.in_channels * taps
    if without_variant(name) != "conv2d":
        per_output = taps * case.representative // case.groups + case.in_channels
    forward = case.batch * height * width * case.out_channels * per_output
    return forward if direction == "forward" else 3 * forward


def with_batch(case: Case, batch: int) -> Case:
    return replace(case, batch=batch)


class Separate(nn.Module):
    """A layer as kernels of its own for each equation, as it would be without the one pass."""

    def __init__(self, layer: SPConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        x3, x1 = x.split((layer.representative_channels, layer.redundant_channels), dim=1)
        window = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        u3 = functional.representative_branch(
            x3, layer.weight_gwc, layer.weight_pwc, groups=layer.groups, backend=layer.backend, **window
        )
        u1 = functional.redundant_branch(x1, layer.weight_redundant, kernel_size=layer.kernel_size, **window)
        return functional.gap_softmax_fusion(u3, u1, backend=layer.backend)


@contextlib.contextmanager
def forced(path: str) -> Iterator[None]:
    """Every layer takes the ``"flat"`` kernels, the ``"descriptor"`` ones where they compute it, or (``"auto"``) what
    it would; in its backward too, which runs in another thread."""
    with contextlib.ExitStack() as stack:
        for kernels in (launch.descriptor, launch.gradients_descriptor) if path != "auto" else ():
            answer = kernels.supports if path == "descriptor" else _never
            stack.enter_context(mock.patch.object(kernels, "can_run", answer))
        yield


def _never(*_: object) -> bool:
    return False


def _run(layer: nn.Module, x: Tensor, grad: Tensor, direction: str) -> Sequence[Tensor]:
    """Output, and gradients of the input and the parameters."""
    if direction == "forward":
        with torch.no_grad():
            return [layer(x)]
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad)]


def wait_for(call: Callable[[], object]) -> object:
    """What a call returns, once its work is done."""
    result = call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return result


@contextlib.contextmanager
def _unsearched() -> Iterator[None]:
    """cuDNN takes the first convolution that it knows: to try all of float64's takes it seconds."""
    searches = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = searches


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
