"""Which convolutions of a network SPConv2d can stand for, and why not the others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from .checks import FLOATING
from .fused import FusedSPConv2d
from .geometry import as_pair
from .hooks import ON_STATE
from .modules import SPConv2d

MIN_CHANNELS = 8
"""Input channels from which a convolution is worth splitting: below are images, whose channels have no look-alikes."""

Convolution = _ConvNd | SPConv2d | FusedSPConv2d

Owners = Mapping[int, list[str]]
"""The names under which a network holds each parameter, by the parameter's id."""


def find_convolutions(model: nn.Module) -> dict[Convolution, tuple[str, ...]]:
    """Convolutions of every kind, each with all its names; in the network's order."""
    found: dict[Convolution, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (_ConvNd, SPConv2d, FusedSPConv2d)):
            found[module] = (*found.get(module, ()), name)
    return found


def described(module: Convolution) -> str:
    """How it prints."""
    try:
        return repr(module)
    except TypeError:  # nn.Conv2d's own, of a padding that was assigned as one number
        return f"{type(module).__name__}({module.in_channels}, {module.out_channels})"


def find_owners(model: nn.Module) -> Owners:
    """Who holds each parameter; a module that stands at several places counts once."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    return owners


def obstacle(module: Convolution, owners: Owners) -> str:
    """Why no SPConv2d, whatever its options, can stand where ``module`` stands; empty if one can."""
    if isinstance(module, SPConv2d):
        return "is an SPConv2d already"
    if isinstance(module, FusedSPConv2d):
        return "is an SPConv layer that is fused for inference"
    if isinstance(module, _ConvTransposeNd):
        return "is a transposed convolution"
    if not isinstance(module, nn.Conv2d):
        return f"is a {type(module).__name__}, not a convolution of images"
    return _obstacle_in_class(module) or _obstacle_in_weight(module, owners) or _obstacle_in_geometry(module)


def _obstacle_in_class(conv: nn.Conv2d) -> str:
    if is_lazy(conv.weight):
        return "has no shape before its first input (lazy)"
    if {"weight"} != conv._parameters.keys() - {"bias"} or conv.bias is not conv._parameters.get("bias"):
        return "has computed weights (a parametrization, pruning or a weight norm) or parameters of its own"
    if type(conv) is not nn.Conv2d:
        return f"is a {type(conv).__name__}, a subclass of nn.Conv2d that may compute something else"
    if "forward" in vars(conv):
        return "has a forward of its own"
    if conv._buffers or conv._modules:
        return "has buffers or modules of its own"
    if any(vars(conv)[name] for name in ON_STATE):
        return "has hooks on its state dict, which may know its parameters by name"
    return ""


def _obstacle_in_weight(conv: nn.Conv2d, owners: Owners) -> str:
    for parameter in conv._parameters.values():
        if parameter is not None and type(parameter) is not nn.Parameter:
            return f"has parameters of type {type(parameter).__name__}"
    others = owners.get(id(conv.weight), [])
    if len(others) > 1:
        return f"shares its weight: {', '.join(others)}"
    if conv.weight.dtype not in FLOATING:
        return f"has weights of {conv.weight.dtype}"
    return ""


def _obstacle_in_geometry(conv: nn.Conv2d) -> str:
    for name in ("kernel_size", "stride", "padding", "dilation"):
        value = getattr(conv, name)
        if not isinstance(value, str) and len(as_pair(value)) != 2:
            return f"has a {name} of {len(value)} numbers, {value}"
    if conv.groups != 1:
        kind = "depthwise" if conv.groups == conv.in_channels else "grouped"
        return f"is {kind} (groups={conv.groups})"
    kernel_size = as_pair(conv.kernel_size)
    if kernel_size == (1, 1):
        return "is 1 x 1"
    if any(size % 2 == 0 for size in kernel_size):
        return f"has an even kernel_size, {conv.kernel_size}, without a centre"
    return ""


def misfit(conv: Convolution, alpha: float, groups: int, min_channels: int) -> str:
    """Why an SPConv2d with these options cannot, or should not, have the channels of ``conv``; empty if it can."""
    if conv.in_channels < min_channels:
        return f"has {conv.in_channels} input channels, fewer than min_channels={min_channels}"
    if conv.in_channels < groups or (alpha < 1 and conv.in_channels == groups):
        return f"has {conv.in_channels} input channels, too few to split with groups={groups}"
    if conv.out_channels % groups:
        return f"has {conv.out_channels} output channels, no multiple of groups={groups}"
    return ""
