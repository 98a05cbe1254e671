"""Layers ready to be timed: built, given an input, and found right."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import Case, assert_within_budget, kept_bytes
from torch import Tensor, nn

import spconv_triton
from benchmarks.allocator import settle
from benchmarks.comparison.memory import peak_bytes
from benchmarks.competitors import DEVICE, DIRECTIONS, LAYOUTS, wait_for
from benchmarks.peers import Octaves, build_layer, count_macs
from benchmarks.peers.catalogue import COMPILED, KEPT
from benchmarks.turns import fastest
from spconv_triton import SPConv2d

CHECKED = 2
"""Images of a batch that are compared with float64; the others get no upstream gradient meanwhile."""

ROUNDINGS = {torch.float32: 64.0, torch.bfloat16: 16.0, torch.float16: 16.0}
"""Half of those, of the largest result, that a result may be off by: hundreds of products are summed as ATen likes, in
float32, and what goes between two convolutions is rounded to the dtype. No eager yardstick: it is the peer itself."""


@dataclass(frozen=True)
class Subject:
    """A layer in one memory format, and what it is run on.

    Attributes:
        inputs, grads: one of each, or two where maps come in two resolutions.
    """

    name: str
    layout: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]

    def forward(self) -> tuple[Tensor, ...]:
        """Inference."""
        with torch.no_grad():
            return run(self.module, self.inputs)

    def step(self) -> tuple[Tensor, ...]:
        """Outputs, and gradients of the inputs and parameters."""
        return self.gradients(self.grads)

    def gradients(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        inputs = tuple(x.detach().requires_grad_() for x in self.inputs)
        outputs = self._train(inputs)
        return (*outputs, *torch.autograd.grad(outputs, [*inputs, *self.module.parameters()], grads))

    def call(self, direction: str) -> Callable[[], object]:
        """To time: returns once the work is done."""
        work = self.forward if direction == DIRECTIONS[0] else self.step
        return functools.partial(wait_for, work)

    def kept_bytes(self) -> int:
        """What autograd keeps for the backward, parameters included, each storage once."""
        inputs = tuple(x.detach().requires_grad_() for x in self.inputs)
        return kept_bytes(lambda: self._train(inputs)[0])

    def _train(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The forward of a step."""
        if not self.name.endswith(KEPT):
            return run(self.module, inputs)
        with spconv_triton.set_recompute(False):
            return run(self.module, inputs)

    def peak_bytes(self, direction: str) -> int:
        return peak_bytes(self.forward if direction == DIRECTIONS[0] else self.step, DEVICE)


def run(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    y = module(inputs[0] if len(inputs) == 1 else Octaves(*inputs))
    return (y.high, y.low) if isinstance(y, Octaves) else (y,)


def make_inputs(case: Case, name: str, dtype: torch.dtype, device: str = DEVICE) -> tuple[Tensor, ...]:
    """Unit-variance maps; for OctConv half of them at half resolution."""
    x = torch.randn(case.batch, case.in_channels, *case.size).to(device, dtype)
    if name != "octconv":
        return (x,)
    low = case.in_channels // 2
    return x[:, low:].contiguous(), F.avg_pool2d(x[:, :low], 2, ceil_mode=True)


def macs(case: Case, name: str) -> int:
    """Of a forward pass."""
    with torch.device("meta"):
        module = _build(case, name)
        inputs = make_inputs(case, name, torch.float32, "meta")
    return count_macs(module, inputs if len(inputs) == 1 else (Octaves(*inputs),))


def find_best(case: Case, name: str, direction: str, dtype: torch.dtype) -> Subject:
    """A competitor in the faster of the two memory formats, compared with float64 in each.

    A compiled one is compiled in the format that is the faster one for the eager one.

    Raises:
        AssertionError: an output or a gradient is outside the error budget.
    """
    settle()
    eager = name.removesuffix(COMPILED)
    torch.manual_seed(0)
    module = _build(case, eager).to(DEVICE, dtype)
    inputs = make_inputs(case, eager, dtype)
    with torch.no_grad():
        grads = tuple(torch.randn(y.shape).to(y.device, dtype) for y in run(module, inputs))
    subjects = {layout: _in_layout(eager, layout, module, inputs, grads, direction) for layout in LAYOUTS}
    for subject in subjects.values():
        check(subject, direction)
    layout = fastest({layout: subject.call(direction) for layout, subject in subjects.items()})
    if name == eager:
        return subjects[layout]
    compiled = torch.compile(subjects[layout].module, fullgraph=True, dynamic=False)
    subject = Subject(name, layout, compiled, subjects[layout].inputs, subjects[layout].grads)
    check(subject, direction)
    return subject


def check(subject: Subject, direction: str) -> None:
    """Its results are within the error budget of float64, for the first images of the very call that is timed.

    Raises:
        AssertionError: one is not.
    """
    few = tuple(x[:CHECKED] for x in subject.inputs)
    if direction == DIRECTIONS[0]:
        got = tuple(y[:CHECKED] for y in subject.forward())
        grads: tuple[Tensor, ...] = ()
    else:
        masked = tuple(g.clone() for g in subject.grads)
        for g in masked:
            g[CHECKED:] = 0
        results = subject.gradients(masked)
        of_images = len(masked) + len(few)  # what follows are the parameters' gradients
        got = (*(r[:CHECKED] for r in results[:of_images]), *results[of_images:])
        grads = tuple(g[:CHECKED] for g in subject.grads)
    names = tuple(f"result {i}" for i in range(len(got)))
    judge = _judge(subject, few, grads)
    exact = judge.step() if grads else judge.forward()
    for name, own, best in zip(names, got, exact, strict=True):
        label = f"{subject.name}, {subject.layout}, {direction}: {name}"
        assert_within_budget(label, own, best.to(own.dtype), best, condition=ROUNDINGS[own.dtype])


def _judge(subject: Subject, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Subject:
    """The same layer, eager and in float64: SPConv by its reference."""
    module = copy.deepcopy(getattr(subject.module, "_orig_mod", subject.module)).double()
    if isinstance(module, SPConv2d):
        module.backend = "reference"
    exact_inputs, exact_grads = (tuple(t.double() for t in tensors) for tensors in (inputs, grads))
    return Subject(subject.name, subject.layout, module, exact_inputs, exact_grads)


def _build(case: Case, name: str) -> nn.Module:
    return build_layer(name, case.in_channels, case.out_channels, case.kernel_size[0], case.stride[0])


def _in_layout(
    name: str,
    layout: str,
    module: nn.Module,
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    direction: str,
) -> Subject:
    memory_format = LAYOUTS[layout]
    # A layer of its own: nn.Module.to moves parameters in place.
    module = copy.deepcopy(module).to(memory_format=memory_format).train(direction != DIRECTIONS[0])
    laid_out = [tuple(t.contiguous(memory_format=memory_format) for t in tensors) for tensors in (inputs, grads)]
    return Subject(name, layout, module, *laid_out)
