"""Swapping the convolutions of somebody else's network for SPConv2d."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from .arguments import check_callable, check_count, check_flag, check_module, check_one_of
from .channels import DEFAULT_ALPHA, DEFAULT_GROUPS, legal_alpha
from .dense import split_weights
from .dispatch import BACKENDS
from .eligibility import MIN_CHANNELS, Convolution, Owners, described, find_convolutions, find_owners, misfit, obstacle
from .hooks import ON_CALLS
from .modules import SPConv2d
from .surgery import check_is_plain, replace

INITS = ("default", "dense")

VANILLA = frozenset(vars(nn.Conv2d(1, 1, 1, device="meta")))
"""Attributes that every nn.Conv2d has; any other was given to it by its network."""


@dataclass(frozen=True)
class Decision:
    """What becomes of one convolution.

    Attributes:
        names: where it stands in the network; several where it is shared.
        convolution: how it prints.
        reason: why it stays; empty where it is swapped.
        in_channels: L.
        representative_channels: alpha L; 0 where it stays, as the two ratios are.
        wanted_alpha, alpha: the ratio that was asked for, and the one that it got.
    """

    names: tuple[str, ...]
    convolution: str
    reason: str
    in_channels: int
    representative_channels: int = 0
    wanted_alpha: float = 0.0
    alpha: float = 0.0

    @property
    def is_rounded(self) -> bool:
        """Whether the layer could not have the ratio that was asked for."""
        return self.alpha != self.wanted_alpha

    def __str__(self) -> str:
        name = ", ".join(self.names) or "the model"
        if self.reason:
            return f"{name} {self.reason}"
        rounded = f" (rounded from {self.wanted_alpha:.4g})" if self.is_rounded else ""
        return f"{name} alpha {self.alpha:.4g}{rounded}: {self.representative_channels} of {self.in_channels} channels"


@dataclass(frozen=True)
class Conversion:
    """What :func:`spconv_triton.convert` does to a network; printed, it is a readable report.

    Attributes:
        swapped, kept: its convolutions, each in the network's order.
    """

    swapped: tuple[Decision, ...]
    kept: tuple[Decision, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} of {len(self.swapped) + len(self.kept)} convolutions become SPConv2d"]
        lines += [f"  {decision}" for decision in self.swapped]
        lines += ["the others stay:"] if self.kept else []
        lines += [f"  {decision}" for decision in self.kept]
        return "\n".join(lines)


def convert(
    model: nn.Module,
    alpha: float | Mapping[str, float] = DEFAULT_ALPHA,
    groups: int = DEFAULT_GROUPS,
    *,
    branch_norm: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    init: str = "default",
    min_channels: int = MIN_CHANNELS,
    backend: str = "auto",
    report: Callable[[Conversion], object] | None = None,
) -> nn.Module:
    """Swap the k x k ``nn.Conv2d`` of ``model`` for :class:`SPConv2d`, in place.

    A layer has the geometry, padding mode, device, dtype, memory format, training flag, hooks and further attributes of
    the convolution whose place it takes, and its very bias. The other weights are new, and trainable even where the old
    ones were frozen. A convolution that stands at several places is one layer at all of them. Who refers to a
    convolution from outside the tree of modules (a plain list, an optimizer) still has the old one: make the optimizer
    afterwards.

    These stay, with the reason in the report: 1 x 1, even, grouped, transposed, 1-d and 3-d convolutions; subclasses
    of ``nn.Conv2d``; lazy ones; those with a weight that is computed (parametrized, pruned, weight norm), shared with
    another module or not a plain tensor; those with a ``forward``, parameters, buffers, modules or state-dict hooks of
    their own; fewer than ``min_channels`` input channels, or too few for ``groups``; and output channels that
    ``groups`` does not divide.

    Patterns are those of ``fnmatch`` for the dotted names of ``model.named_modules()``; ``*`` matches dots too.

    Args:
        model: a network, or a convolution itself. Compile it, wrap it in DDP or shard it by FSDP afterwards.
        alpha: share of representative channels, in (0, 1]; or a mapping from patterns to shares, of which the first
            that matches counts, and what none matches stays. A layer that cannot have a share gets the nearest below
            it that it can have, and at least G channels (:func:`spconv_triton.models.legal_alpha`).
        groups, branch_norm, backend: of the layers; see :class:`SPConv2d`.
        include: patterns; what matches none stays. None takes all.
        exclude: patterns; what matches one stays.
        init: ``"default"`` draws the weights afresh. ``"dense"`` makes them from the old ones by least squares
            (:func:`spconv_triton.dense.split_weights`): a better start for fine-tuning, and no replacement for it. The
            measured gain is with :data:`spconv_triton.dense.CORRELATION`.
        min_channels: what has fewer input channels stays. By default that is a network's first convolution, which
            reads an image and stays in the paper too.
        report: called with the :class:`.Conversion` once all layers are made and before any is put in place; ``print``
            will do. If it raises, the model stays as it is.

    Returns:
        ``model``; where that is a convolution itself, what takes its place.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument that is not legal; a pattern that matches no convolution, or none that an earlier one
            has not taken; a model that is scripted, compiled, wrapped in
            DDP or sharded by FSDP. The model is then as it was.
    """
    _check_options(model, groups, branch_norm, init, min_channels, backend, report)
    choices = _Choices(alpha, include, exclude)
    convolutions = find_convolutions(model)
    choices.check_against(list(convolutions.values()))
    owners = find_owners(model)
    decisions = {
        module: _decide(module, names, owners, choices, groups, min_channels) for module, names in convolutions.items()
    }
    layers: dict[nn.Module, SPConv2d] = {}
    for module, decision in decisions.items():
        if isinstance(module, nn.Conv2d) and not decision.reason:
            layers[module] = _make_layer(module, decision.alpha, groups, branch_norm, init, backend)
    if report is not None:
        kept = tuple(decision for decision in decisions.values() if decision.reason)
        report(Conversion(tuple(decision for decision in decisions.values() if not decision.reason), kept))
    return replace(model, layers)


def _decide(
    module: Convolution, names: tuple[str, ...], owners: Owners, choices: _Choices, groups: int, min_channels: int
) -> Decision:
    wanted, reason = choices.alpha_of(names)
    reason = obstacle(module, owners) or reason or misfit(module, wanted, groups, min_channels)
    channels = int(module.in_channels)  # which may be NumPy's
    if reason:
        return Decision(names, described(module), reason, channels)
    alpha = legal_alpha(channels, wanted, groups)
    return Decision(names, described(module), "", channels, int(channels * alpha), wanted, alpha)


def _make_layer(conv: nn.Conv2d, alpha: float, groups: int, branch_norm: bool, init: str, backend: str) -> SPConv2d:
    """What takes the place of ``conv``, which is left as it is, though its hooks are then those of both."""
    layer = SPConv2d.from_conv2d(conv, alpha, groups, branch_norm=branch_norm, backend=backend)
    layer.bias = conv.bias
    if init == "dense":
        weights = split_weights(conv.weight.detach(), layer.representative_channels, layer.geometry)
        with torch.no_grad():
            for parameter, weight in zip(
                (layer.weight_gwc, layer.weight_pwc, layer.weight_redundant), weights, strict=True
            ):
                if parameter is not None:
                    parameter.copy_(weight)
    for name in ON_CALLS:  # the dictionaries themselves: whoever holds a handle can still remove its hook
        setattr(layer, name, getattr(conv, name))
    for name, value in vars(conv).items():
        if name not in VANILLA and not hasattr(layer, name):
            setattr(layer, name, value)
    return layer


class _Choices:
    """Which convolutions are asked for, and with which alpha.

    Args:
        alpha, include, exclude: as of :func:`convert`.

    Raises:
        TypeError, ValueError: as of :func:`convert`.
    """

    def __init__(
        self,
        alpha: float | Mapping[str, float],
        include: str | Iterable[str] | None,
        exclude: str | Iterable[str] | None,
    ) -> None:
        self.is_mapping = isinstance(alpha, Mapping)
        self.alphas: Mapping[str, float] = alpha if isinstance(alpha, Mapping) else {"*": alpha}
        if not self.alphas:
            raise ValueError("alpha must be a number or a mapping with at least one pattern, got an empty mapping")
        for pattern, value in self.alphas.items():
            name = f"alpha[{pattern!r}]" if self.is_mapping else "alpha"
            if not isinstance(pattern, str):
                raise TypeError(f"alpha must map patterns, which are strings, to numbers, got the key {pattern!r}")
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value}")
        self.include = None if include is None else _patterns("include", include)
        self.exclude = () if exclude is None else _patterns("exclude", exclude)

    def alpha_of(self, names: tuple[str, ...]) -> tuple[float, str]:
        """The alpha asked for a convolution with these names, and why it should stay; empty if it should not."""
        pattern = next((pattern for pattern in self.alphas if _matches(pattern, names)), None)
        excluded = next((pattern for pattern in self.exclude if _matches(pattern, names)), None)
        if excluded is not None:
            return 0.0, f"is excluded by {excluded!r}"
        if self.include is not None and not any(_matches(pattern, names) for pattern in self.include):
            return 0.0, "is not included"
        if pattern is None:
            return 0.0, "matches no pattern of alpha"
        return self.alphas[pattern], ""

    def check_against(self, convolutions: list[tuple[str, ...]]) -> None:
        """Every pattern has something to match.

        Raises:
            ValueError: one has not: a slip of the pen that would otherwise convert too little or too much in silence.
        """
        alphas = tuple(self.alphas) if self.is_mapping else ()
        given = {"alpha": alphas, "include": self.include or (), "exclude": self.exclude}
        for argument, pattern in ((argument, pattern) for argument, patterns in given.items() for pattern in patterns):
            if not any(_matches(pattern, names) for names in convolutions):
                some = ", ".join(repr(names[0]) for names in convolutions[:4]) or "none"
                raise ValueError(
                    f"{argument} must have patterns that match convolutions, got {pattern!r}, which matches none of "
                    f"the model's {len(convolutions)} ({some}{', ...' if len(convolutions) > 4 else ''})"
                )
        reached = {next((p for p in self.alphas if _matches(p, names)), None) for names in convolutions}
        for pattern in alphas:
            if pattern not in reached:
                raise ValueError(
                    f"alpha must have the special patterns before the general ones, got {pattern!r} behind patterns "
                    "that take all that it matches"
                )


def _matches(pattern: str, names: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _patterns(argument: str, value: str | Iterable[str]) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{argument} must be a pattern or several, got {value!r}")
    patterns = tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must be patterns, which are strings, got {pattern!r}")
    if not patterns:
        raise ValueError(f"{argument} must be None or at least one pattern, got {value!r}")
    return patterns


def _check_options(
    model: nn.Module, groups: int, branch_norm: bool, init: str, min_channels: int, backend: str, report: object
) -> None:
    check_module(model)
    check_count("groups", groups)
    check_count("min_channels", min_channels)
    check_flag("branch_norm", branch_norm)
    check_one_of("init", init, INITS)
    check_one_of("backend", backend, BACKENDS)
    check_callable("report", report)
    check_is_plain(model, "convert")
