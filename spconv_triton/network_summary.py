"""What a network's convolutions cost, beside what they would cost if each were an ``nn.Conv2d``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from .arguments import check_module
from .channels import DEFAULT_ALPHA, DEFAULT_GROUPS
from .eligibility import MIN_CHANNELS, Convolution, described, find_convolutions, find_owners, misfit, obstacle
from .fused import FusedSPConv2d
from .geometry import as_pair
from .hooks import is_compiled
from .modules import SPConv2d


@dataclass(frozen=True)
class Costs:
    """Before: with an ``nn.Conv2d`` where an SPConv2d stands. After: as it is.

    Attributes:
        parameters_before, parameters_after: learnable numbers, each once; of a fused layer, which has none, those of
            its weights and its bias, not of the norms that went into it.
        macs_before, macs_after: multiply-accumulates of one forward pass.
    """

    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int

    def __str__(self) -> str:
        return " ".join(
            f"{before:>13,} {after:>13,} {after / before if before else 1:>6.2f}"
            for before, after in (
                (self.parameters_before, self.parameters_after),
                (self.macs_before, self.macs_after),
            )
        )


@dataclass(frozen=True)
class Row:
    """One convolution.

    Attributes:
        names: where it stands in the network; several where it is shared.
        layer: how it prints.
        costs: over all calls in a pass.
        is_spconv: whether it is an SPConv2d, or was one before :func:`spconv_triton.fuse`.
        reason: why it is none; empty if it is, or if ``convert`` with its defaults would make it one.
    """

    names: tuple[str, ...]
    layer: str
    costs: Costs
    is_spconv: bool
    reason: str


@dataclass(frozen=True)
class Summary:
    """What :func:`spconv_triton.summary` found; printed, it is a readable table.

    Attributes:
        rows: the convolutions, in the network's order.
        total: of the whole network. MACs are those of everything that is a matrix product: convolutions, linear layers,
            attention.
    """

    rows: tuple[Row, ...]
    total: Costs

    def __str__(self) -> str:
        names = [", ".join(row.names) or "the model" for row in self.rows]
        width = max(map(len, [*names, "whole network"]))
        columns = "parameters: before after ratio", "MACs: before after ratio"
        lines = [" ".join([" " * width, *(f"{text:>34}" for text in columns)])]
        for name, row in zip(names, self.rows, strict=True):
            lines.append(f"{name:<{width}} {row.costs}  {_remark(row)}")
        return "\n".join([*lines, f"{'whole network':<{width}} {self.total}"])


def summary(model: nn.Module, input_size: Any) -> Summary:
    """Print, layer by layer and in total, parameters and MACs of ``model``, and return them.

    Runs the model once, in eval mode without gradients and eagerly, on the device where it is (``meta`` will do if the
    model's code can run there). Training flags, statistics and random generators are left as they were.

    Args:
        model: a network, converted or not.
        input_size: a shape such as ``(1, 3, 224, 224)``, for which zeros are made where the model's parameters are and
            in their dtype; or the model's input itself; or a tuple of its inputs, each a shape or an input. A detection
            model, which takes a list of images, has the inputs ``([image, image],)``.

    Returns:
        What was printed, as data: a row for every convolution, and the total.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` is scripted, or ``input_size`` is empty or has a negative size.
        Exception: whatever the model raises for such an input.
    """
    found = summarize(model, input_size)
    print(found)
    return found


def summarize(model: nn.Module, input_size: Any) -> Summary:
    """As :func:`spconv_triton.summary`, in silence."""
    check_module(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model must not be scripted: its convolutions are no modules any more")
    model = _unwrap(model)
    convolutions = find_convolutions(model)
    with _undisturbed(model):
        macs, other_macs = _count(model, _make_inputs(model, input_size), convolutions)
    owners = find_owners(model)
    rows = []
    for module, names in convolutions.items():
        is_spconv = isinstance(module, (SPConv2d, FusedSPConv2d))
        reason = (
            "" if is_spconv else obstacle(module, owners) or misfit(module, DEFAULT_ALPHA, DEFAULT_GROUPS, MIN_CHANNELS)
        )
        now = _parameters(module)
        dense = _dense_parameters(module) if isinstance(module, (SPConv2d, FusedSPConv2d)) else now
        rows.append(Row(names, described(module), Costs(dense, now, *macs[module]), is_spconv, reason))
    now = sum(p.numel() for p in model.parameters())
    now += sum(_parameters(module) for module in convolutions if isinstance(module, FusedSPConv2d))
    saved = sum(row.costs.parameters_before - row.costs.parameters_after for row in rows)
    before, after = (sum(column) + other_macs for column in zip((0, 0), *macs.values(), strict=True))
    return Summary(tuple(rows), Costs(now + saved, now, before, after))


def _count(
    model: nn.Module, inputs: tuple[Any, ...], convolutions: Iterable[Convolution]
) -> tuple[dict[Convolution, tuple[int, int]], int]:
    """MACs before and after of each convolution, and those of everything else, of one forward pass.

    PyTorch counts everything else; what convolutions cost follows from their shapes, whichever path computes them.
    """
    macs = dict.fromkeys(convolutions, (0, 0))
    started: dict[nn.Module, int] = {}
    inside = 0

    def start(module: nn.Module, _args: Any) -> None:
        started[module] = flops.get_total_flops()

    def stop(module: Convolution, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        nonlocal inside
        inside += flops.get_total_flops() - started[module]
        dense, now = _macs(module, args[0] if args else kwargs["input"], output)
        macs[module] = macs[module][0] + dense, macs[module][1] + now

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with ExitStack() as hooks, FlopCounterMode(display=False) as flops, torch.no_grad():
        for module in macs:
            hooks.callback(module.register_forward_pre_hook(start).remove)
            hooks.callback(module.register_forward_hook(stop, prepend=True, with_kwargs=True).remove)
        torch.func.functional_call(model, buffers, inputs)
        return macs, (flops.get_total_flops() - inside) // 2


def _macs(module: Convolution, x: Tensor, y: Tensor) -> tuple[int, int]:
    """MACs of one call, with a dense convolution and as it is."""
    if isinstance(module, (SPConv2d, FusedSPConv2d)):
        taps = prod(module.kernel_size)
        return y.numel() * taps * module.in_channels, y.numel() * (module.weight_gwc[0].numel() + module.in_channels)
    pixels, channels = (x, module.out_channels) if module.transposed else (y, module.in_channels)
    macs = pixels.numel() * prod(as_pair(module.kernel_size)) * channels // module.groups
    return macs, macs


def _parameters(module: Convolution) -> int:
    tensors: Iterable[Tensor] = module.parameters()
    if isinstance(module, FusedSPConv2d):
        weights = module.weight_gwc, module.weight_pwc, module.weight_redundant, module.bias
        tensors = [tensor for tensor in weights if tensor is not None]
    return sum(tensor.numel() for tensor in tensors)


def _dense_parameters(layer: SPConv2d | FusedSPConv2d) -> int:
    """Those of the ``nn.Conv2d`` in whose place the layer stands."""
    return layer.out_channels * (layer.in_channels * prod(layer.kernel_size) + (layer.bias is not None))


def _remark(row: Row) -> str:
    return row.reason or (row.layer.partition("(")[0] if row.is_spconv else "could be an SPConv2d")


def _unwrap(model: nn.Module) -> nn.Module:
    """The network inside DDP, DataParallel and ``torch.compile``: those would call all processes or compile."""
    while True:
        if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules and is_compiled(model):
            model = model.get_submodule("_orig_mod")
        else:
            return model


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Everything in eval mode and eager, and afterwards as it was."""
    training = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.is_cuda}
    compiled = any(is_compiled(module) for module in training)
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    try:
        with torch.random.fork_rng(devices), eager:
            for module in training:
                module.training = False  # not eval(), which a network may have given another meaning
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _make_inputs(model: nn.Module, given: Any) -> tuple[Any, ...]:
    """The positional arguments that ``input_size`` stands for."""
    if isinstance(given, tuple) and not _is_shape(given):
        return tuple(_make_input(model, value) for value in given)
    return (_make_input(model, given),)


def _make_input(model: nn.Module, given: Any) -> Any:
    if not _is_shape(given):
        return given
    if not given or min(given) < 0:
        raise ValueError(f"input_size must be a shape such as (1, 3, 224, 224), or inputs, got {given!r}")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(tuple(given), device=like.device, dtype=like.dtype)


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
