"""Whether every path is right on this device: against float64, under torch.compile, in a CUDA graph."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from cases import Case, assert_agrees, assert_within_budget, make_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from weight_updates import assert_follows, in_place, optimizer_step

from benchmarks.competitors import TF32_ROUNDING, forced
from benchmarks.gpu import plan
from benchmarks.gpu.device import Device, device_of
from benchmarks.gpu.record import Record
from spconv_triton import SPConv2d, functional, registration

WIDE = Case("wide", 3, 64, 64, (7, 6))
"""A layer that suits descriptors, in half precision."""

BATCHES = (8, 12, 30)
FEW_IMAGES = (2, 3)
"""Of one compiled function. A weight gradient goes in more slices the more pixels there are, up to a limit; PyTorch
compiles anew where there is but one slice, and at the limit. These are in between."""


@contextlib.contextmanager
def multiplied_as(precision: str) -> Iterator[None]:
    """Float32 convolutions as ``"ieee"`` or ``"tf32"``: cuDNN's, and ours, which follow its setting."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = precision
    try:
        yield
    finally:
        conv.fp32_precision = before


def has_descriptors(device: Device) -> bool:
    """Whether kernels over tensor maps run here; the interpreter runs them too."""
    return device.name == "cpu" or torch.cuda.get_device_capability()[0] in (9, 10)


def correctness(record: Record) -> None:
    """Forward and every gradient, within the tests' error budgets."""
    device = device_of(record)
    if not has_descriptors(device):
        record.note("no tensor maps on this device: the flat kernels alone")
    for case, dtype, paths in plan.checked(rehearsal=record.rehearsal):
        for path in paths:
            if path == "descriptor" and not has_descriptors(device):
                continue
            for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
                torch.manual_seed(0)
                inputs = make_inputs(case, dtype, device=device.name, branch_bias=case.alpha < 1)
                condition = TF32_ROUNDING if precision == "tf32" else 1.0
                kind = f"{_name(dtype)} as {precision}" if dtype == torch.float32 else _name(dtype)
                name = f"{case}, {kind}, {path}"
                with multiplied_as(precision), forced(path), record.check(name, device.synchronize):
                    assert_agrees(functional.spconv2d, inputs, condition=condition, backend="triton")
    for dtype in (torch.float32,) if record.rehearsal else (torch.float32, torch.float16):
        with multiplied_as("ieee"), record.check(f"branch norms in training, {_name(dtype)}", device.synchronize):
            _branch_norms_agree(device, plan.TINY if record.rehearsal else WIDE, dtype)


def _branch_norms_agree(device: Device, case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    window = (case.in_channels, case.out_channels, case.kernel_size)
    like: dict[str, Any] = {"device": device.name, "dtype": dtype}
    layer = SPConv2d(*window, padding=case.padding, branch_norm=True, backend="reference", **like)
    x = torch.randn(case.batch, case.in_channels, *case.size, **like)
    grad = torch.randn(case.batch, case.out_channels, *case.size, **like)
    names = ["y", "x", *(name for name, _ in layer.named_parameters()), *(name for name, _ in layer.named_buffers())]
    kernels, same, exact = (copy.deepcopy(layer) for _ in range(3))
    kernels.backend = "triton"
    results = [_train(module, x, grad) for module in (kernels, same, exact.double())]
    for name, got, same_dtype, judge in zip(names, *results, strict=True):
        if judge.is_floating_point():
            # What the norms divide by is itself a result.
            assert_within_budget(name, got, same_dtype, judge, condition=4.0)
        else:
            assert torch.equal(got, judge), f"{name}: {got}, expected {judge}"


def _train(layer: SPConv2d, x: Tensor, grad: Tensor) -> list[Tensor]:
    dtype = layer.weight_gwc.dtype
    x = x.to(dtype).requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], grad.to(dtype))
    return [y.detach(), *gradients, *layer.buffers()]


def operators(record: Record) -> None:
    """``torch.library.opcheck`` on every operator of ours, with arguments as layers call it."""
    device = device_of(record)
    # The rest, which runs an operator many times over, is in tests/kernels.
    options = {"test_utils": ("test_schema", "test_faketensor")} if record.rehearsal else {}
    found = _calls(device)
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{registration.NAMESPACE}::")}
    registered = {name.partition("::")[2].partition(".")[0] for name in names}
    registered = {name for name in registered if not name.startswith("native")}  # which are for a CPU
    for name in sorted(registered - found.keys()):
        if "descriptor" in name and not has_descriptors(device):
            record.note(f"{name}: this device has no tensor maps")
            continue
        with record.check(name):
            raise AssertionError("no layer calls this operator")
    for name, arguments in found.items():
        if f"{name}_backward" in registered:  # it is differentiable
            arguments = [a.requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
        with record.check(name, device.synchronize):
            operator = getattr(torch.ops.spconv_triton, name).default
            torch.library.opcheck(operator, tuple(arguments), **options)


def _calls(device: Device) -> dict[str, list[Any]]:
    """The arguments with which layers of every kind call the operators, forward and backward."""
    found: dict[str, list[Any]] = {}

    def note(name: str, arguments: Sequence[Any]) -> None:
        copied = [a.detach().clone() if isinstance(a, Tensor) else a for a in arguments]
        found.setdefault(name.partition("::")[2], copied)

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == registration.NAMESPACE:
                note(function._schema.name, args)
            return function(*args, **(kwargs or {}))

    def opaque(operator: registration.OpaqueOp, *arguments: Any) -> Any:
        note(operator.operator._qualname, arguments)
        return operator.body(*arguments)

    def train(x: Tensor, **options: Any) -> None:
        x = x.to(device.name).contiguous(memory_format=torch.channels_last).requires_grad_()
        layer = SPConv2d(x.shape[1], x.shape[1], 3, padding=1, backend="triton", device=device.name, **options)
        layer.to(x.dtype)(x).square().sum().backward()

    x = torch.randn(1, 4, 4, 3)
    inputs = make_inputs(Case("narrow", 1, 4, 4, (3, 2)), device=device.name, bias=False)
    # In a thread of its own autograd would be out of the mode's sight; an operator within another is so too.
    with (
        Noting(),
        mock.patch.object(registration.OpaqueOp, "__call__", opaque),
        torch.autograd.set_multithreading_enabled(False),
    ):
        with forced("flat"):
            train(x, stride=2)
        if has_descriptors(device):
            with forced("descriptor"):
                train(torch.randn(1, 64, 2, 2, dtype=torch.float16))
        train(x, alpha=1.0)
        train(x, branch_norm=True)
        with torch.no_grad():
            residual = torch.randn(1, 4, 3, 2, device=device.name)
            functional.spconv2d_inference(
                *inputs.positional(), **inputs.window, residual=residual, activation="relu", backend="triton"
            )
        u3, u1 = (torch.randn(1, 4, 3, 2, device=device.name).requires_grad_() for _ in range(2))
        functional.gap_softmax_fusion(u3, u1, backend="triton").square().sum().backward()
    return found


def dynamo(record: Record) -> None:
    """One graph forward and backward, the results of eager mode, and no new graph for a new batch size."""
    device = device_of(record)
    options: dict[str, Any] = {"backend": "aot_eager"} if record.rehearsal else {}
    narrow = 4 if record.rehearsal else 32
    batches = FEW_IMAGES if record.rehearsal else BATCHES
    layers = [("flat", torch.float32, narrow, False)]
    if not record.rehearsal:
        layers.append(("flat", torch.float32, narrow, True))
        if has_descriptors(device):
            layers += [("descriptor", torch.float16, 64, norm) for norm in (False, True)]
    for path, dtype, channels, branch_norm in layers:
        torch._dynamo.reset()
        torch.manual_seed(0)
        layer = SPConv2d(channels, channels, 3, padding=1, branch_norm=branch_norm, backend="triton")
        layer.to(device.name, dtype, memory_format=torch.channels_last)
        compiled = torch.compile(layer, fullgraph=True, **options)
        name = f"one graph for every batch, {path}{', branch norms' if branch_norm else ''}"
        with multiplied_as("ieee"), forced(path), record.check(name, device.synchronize):
            for batch in batches:
                with torch._dynamo.config.patch(error_on_recompile=batch != batches[0]):
                    _compiled_equals_eager(device, layer, compiled, batch)


def _compiled_equals_eager(device: Device, layer: SPConv2d, compiled: Callable[[Tensor], Tensor], batch: int) -> None:
    side = 2 if device.name == "cpu" else 14
    dtype = layer.weight_gwc.dtype
    x = torch.randn(batch, layer.in_channels, side, side, device=device.name, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    torch._dynamo.mark_dynamic(x, 0)
    grad = torch.randn_like(x)
    results = [(y, *torch.autograd.grad(y, [x, *layer.parameters()], grad)) for y in (compiled(x), layer(x))]
    # The same kernels, maybe tuned to other blocks, hence other orders of summation.
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def graphs(record: Record) -> None:
    """Replays compute what eager calls do, and see new weights."""
    device = device_of(record)
    case = replace(WIDE, batch=1, in_channels=4, out_channels=4, size=(3, 2)) if record.rehearsal else WIDE
    x = torch.randn(case.batch, case.in_channels, *case.size, device=device.name)
    options: dict[str, Any] = {"backend": "aot_eager"} if record.rehearsal else {"mode": "reduce-overhead"}
    for update in (in_place, optimizer_step):
        name = f"weights changed by {update.__name__}"
        with multiplied_as("ieee"), record.check(f"{name}, then a replay", device.synchronize):
            layer = _layer(case, device)
            assert_follows(layer, x, update, _replayed(record, device, layer, x))
        with multiplied_as("ieee"), record.check(f"{name}, mode='reduce-overhead'", device.synchronize):
            layer = _layer(case, device)
            torch._dynamo.reset()
            compiled = torch.compile(layer, fullgraph=True, **options)
            assert_follows(layer, x, update, lambda x, compiled=compiled: _settled(compiled, x))
    with record.check("a training step as a graph", device.synchronize):
        _step_replays(record, device, case)


def _settled(compiled: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The first call warms up, the second is recorded, and then there are replays."""
    for _ in range(3):
        y = compiled(x).clone()
    return y


def _layer(case: Case, device: Device) -> SPConv2d:
    torch.manual_seed(0)
    return SPConv2d(case.in_channels, case.out_channels, 3, padding=1, backend="triton", device=device.name)


def _replayed(record: Record, device: Device, layer: SPConv2d, x: Tensor) -> Callable[[Tensor], Tensor]:
    """``layer`` in inference on ``x``, captured once; in a rehearsal the layer itself."""
    with torch.inference_mode():
        captured = device.capture(lambda: layer(x))
    if captured is None:
        record.needs_gpu("capture and replay")
        return layer
    replay, y = captured

    def call(_: Tensor) -> Tensor:
        replay()
        return y.clone()

    return call


def _step_replays(record: Record, device: Device, case: Case) -> None:
    layer = _layer(case, device)
    x = torch.randn(case.batch, case.in_channels, *case.size, device=device.name).requires_grad_()
    grad = torch.randn(case.batch, case.out_channels, *case.output_size(), device=device.name)

    def step() -> tuple[Tensor, ...]:
        y = layer(x)
        return y, *torch.autograd.grad(y, [x, *layer.parameters()], grad)

    captured = device.capture(step)
    if captured is None:
        record.needs_gpu("capture and replay")
        return
    replay, results = captured
    with torch.no_grad():
        for tensor in (x, grad):
            tensor.copy_(torch.randn_like(tensor))
    replay()
    device.synchronize()
    for got, expected in zip(results, step(), strict=True):
        assert torch.equal(got, expected), "a replay differs from the same step in eager mode"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
