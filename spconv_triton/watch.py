"""Whether tensors are what they were, so that what was computed from them still holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SAMPLE = 512
"""Values of a tensor that are compared, or as many as it has output channels."""


class Watch:
    """Tensors as they are now: at the same places and in the same versions, which in-place operations, optimizers and
    ``load_state_dict`` move, until they change.

    What is written past the version, through ``tensor.data`` or by another process, is seen by a sample of the values,
    which has one of every output channel and goes through input channels and taps. Places stay theirs: the memory is
    held.

    Args:
        tensors: on a CPU; :func:`can_watch` them.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self._state = [*map(_place, tensors)]
        self._some = [_sample(tensor.detach()) for tensor in tensors if tensor is not None]
        self._were = [some.clone() for some in self._some]

    def holds(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these are those, unchanged."""
        return self._state == [*map(_place, tensors)] and all(map(torch.equal, self._some, self._were))


def can_watch(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all of them have a version: those made in inference mode do not."""
    return not any(tensor is not None and tensor.is_inference() for tensor in tensors)


def _place(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride())


def _sample(tensor: Tensor) -> Tensor:
    """Values of [M, ...], evenly spread over their memory; a view, and all of them where the memory has gaps."""
    dense = tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    if not dense or tensor.numel() <= SAMPLE:
        return tensor
    length = tensor[0].numel()
    step = max(1, tensor.numel() // max(SAMPLE, tensor.shape[0]))
    while math.gcd(step, length) > 1:  # else it would meet the same few places of every output channel
        step -= 1
    return tensor.as_strided((-(-tensor.numel() // step),), (step,))
