"""A function of those of its arguments that are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def of_present(
    function: Callable[..., Tensor], arguments: Sequence[Tensor | None]
) -> tuple[list[int], Callable[..., Tensor]]:
    """Which arguments are not None, and ``function`` of these alone, for ``torch.func``, which knows no None."""
    present = [i for i, argument in enumerate(arguments) if argument is not None]

    def function_of_present(*values: Tensor) -> Tensor:
        every = list(arguments)
        for i, value in zip(present, values, strict=True):
            every[i] = value
        return function(*every)

    return present, function_of_present


def spread(values: Sequence[Tensor], present: Sequence[int], count: int) -> list[Tensor | None]:
    """``count`` values, None where no argument is."""
    every: list[Tensor | None] = [None] * count
    for i, value in zip(present, values, strict=True):
        every[i] = value
    return every
