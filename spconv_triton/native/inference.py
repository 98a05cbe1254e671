"""What a layer remembers on a CPU from one inference to the next: its weights, prepared, and calls that fitted."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import is_transformed, is_watched
from ..geometry import Geometry
from ..layout import memory_format
from ..watch import Watch, can_watch
from .products import are_products_precise
from .weights import PreparedWeights, Weights, are_preparable, prepare

KINDS = 1024
"""How many kinds of calls are remembered."""

Given = tuple[Tensor, Tensor, Tensor | None]
"""The group-wise, the point-wise and, unless alpha = 1, the redundant weight of a layer."""

Others = tuple[Tensor | None, ...]
"""What else a layer is called with: biases, the scale of a norm, a residual."""


class _Kept(NamedTuple):
    """What is known of the weights.

    Attributes:
        watch: over the weights as they were given.
        weights: prepared.
        kinds: the calls that fitted, and the memory format of their results.
    """

    watch: Watch
    weights: PreparedWeights
    kinds: dict[Any, torch.memory_format]


class Inference:
    """The memory of a layer, while a :class:`.watch.Watch` over its weights holds. Copies and pickles forget."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def __reduce__(self) -> tuple[type[Inference], tuple[()]]:
        return Inference, ()

    def forget(self) -> None:
        self._kept = None

    def weights(self, x: Tensor, given: Given, geometry: Geometry) -> Weights:
        """The weights, prepared where that is possible, and kept where they can be watched."""
        if torch.is_autocast_enabled("cpu"):  # which makes new ones for every call
            return prepare(x, *given, geometry)
        can_be_watched = can_watch(given)
        kept = self._kept
        if kept is not None and not (can_be_watched and kept.watch.holds(given)):
            self._kept = kept = None  # whatever follows, their memory is free
        if not can_be_watched or not are_preparable(x, given[0], geometry):
            return prepare(x, *given, geometry)
        if kept is not None and kept.weights.geometry == geometry:
            return kept.weights
        watch = Watch(given)  # before they are read: what another thread changes then is seen
        weights = prepare(x, *given, geometry)
        if isinstance(weights, PreparedWeights):
            self._kept = _Kept(watch, weights, {})
        return weights

    def learn(self, call: Any, x: Tensor, weights: Weights, others: Others) -> None:
        """The call that has just been made fits, and so will the next of its kind.

        Args:
            call: what it was made with besides tensors.
            x, others: the tensors besides the weights.
            weights: of :meth:`weights`.
        """
        kept = self._kept
        if kept is None or kept.weights is not weights or type(x) is not Tensor:
            return
        if len(kept.kinds) >= KINDS:
            kept.kinds.clear()
        with contextlib.suppress(TypeError):  # a window of lists has no hash
            kept.kinds[_kind(call, x, others)] = memory_format(x)

    def recall(
        self, call: Any, x: Tensor, given: Given, others: Others
    ) -> tuple[PreparedWeights, torch.memory_format] | None:
        """The weights and the memory format of the result, if a call of this kind has fitted; nothing else is checked.

        Args:
            call, x, others: as of :meth:`learn`.
            given: as of :meth:`weights`.
        """
        kept = self._kept
        if kept is None or type(x) is not Tensor or x.layout is not torch.strided or _is_observed():
            return None
        try:
            layout = kept.kinds.get(_kind(call, x, others))
            if layout is None or not kept.watch.holds(given):
                return None
        except (AttributeError, RuntimeError, TypeError):  # no tensor, a weight without a version, a window of lists
            return None
        return kept.weights, layout


def _kind(call: Any, x: Tensor, others: Others) -> tuple[Any, ...]:
    kinds = [None if t is None else (t.shape, t.dtype, t.device) for t in others]
    return call, x.shape, x.stride(), x.dtype, x.device, *kinds


def _is_observed() -> bool:
    """Whether more is asked than the result, or another way to it."""
    return (
        torch.is_grad_enabled()
        or is_watched()
        or torch.is_autocast_enabled("cpu")
        or is_transformed()
        or not torch._C._get_mkldnn_enabled()
        or not are_products_precise(torch.float32)
    )
