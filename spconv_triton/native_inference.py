"""What a layer remembers on a CPU from one inference to the next: its weights, prepared, and calls that fitted."""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import is_transformed
from .geometry import Geometry
from .layout import memory_format
from .native_convolution import are_products_precise
from .native_weights import PreparedWeights, Weights, are_preparable, prepare

SAMPLE = 512
"""Values of a weight that are compared in every call, or as many as it has output channels."""

KINDS = 1024
"""How many kinds of calls are remembered."""

Given = tuple[Tensor, Tensor, Tensor | None]
"""The group-wise, the point-wise and, unless alpha = 1, the redundant weight of a layer."""

Others = tuple[Tensor | None, ...]
"""What else a layer is called with: biases, the scale of a norm, a residual."""


class _Kept(NamedTuple):
    """What is known of the weights.

    Attributes:
        state: where they lie, their versions, and the window.
        some, were: some values of each, as they are and as they were.
        weights: prepared; they keep the memory from being given to others.
        kinds: the calls that fitted, and the memory format of their results.
    """

    state: tuple[Any, ...]
    some: list[Tensor]
    were: list[Tensor]
    weights: PreparedWeights
    kinds: dict[Any, torch.memory_format]


class Inference:
    """The memory of a layer.

    It holds for as long as the weights are what they were: at the same places and in the same versions, which in-place
    operations, optimizers and ``load_state_dict`` move. What is written past the version, through ``weight.data`` or by
    another process, is seen by a sample of the values, which has one of every output channel and goes through input
    channels and taps. Copies and pickles of a layer remember nothing.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def __reduce__(self) -> tuple[type[Inference], tuple[()]]:
        return Inference, ()

    def forget(self) -> None:
        self._kept = None

    def weights(self, x: Tensor, given: Given, geometry: Geometry) -> Weights:
        """The weights, prepared where that is possible."""
        kept, state = self._kept, None
        if not any(w is not None and w.is_inference() for w in given):  # those have no version
            state = _state(*given, geometry)
            if kept is not None and are_preparable(x, given[0], geometry) and _holds(kept, state):
                return kept.weights
        weights = prepare(x, *given, geometry)
        if isinstance(weights, PreparedWeights) and state is not None:
            some = [_sample(weight) for weight in weights.given if weight is not None]
            self._kept = _Kept(state, some, [values.clone() for values in some], weights, {})
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
            if layout is None or not _holds(kept, _state(*given, kept.weights.geometry)):
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
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.is_autocast_enabled("cpu")
        or is_transformed()
        or not torch._C._get_mkldnn_enabled()
        or not are_products_precise(torch.float32)
    )


def _state(gwc: Tensor, pwc: Tensor, redundant: Tensor | None, geometry: Geometry) -> tuple[Any, ...]:
    return geometry, *_place(gwc), *_place(pwc), *(() if redundant is None else _place(redundant))


def _place(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight._version, weight.shape, weight.stride()


def _holds(kept: _Kept, state: tuple[Any, ...]) -> bool:
    return kept.state == state and all(map(torch.equal, kept.some, kept.were))


def _sample(weight: Tensor) -> Tensor:
    """Values of [M, ...], evenly spread over their memory; a view, and all of them where the memory has gaps."""
    if not (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)):
        return weight
    length = weight[0].numel()
    step = max(1, weight.numel() // max(SAMPLE, weight.shape[0]))
    while math.gcd(step, length) > 1:  # else it would meet the same few places of every output channel
        step -= 1
    return weight.as_strided((-(-weight.numel() // step),), (step,))
