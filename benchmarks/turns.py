"""The order in which competitors take turns."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

One = TypeVar("One")


def turns(competitors: Sequence[One], rounds: int) -> Iterator[list[One]]:
    """Every competitor once a round, each round in an order of its own, the same in every run.

    An order that is kept, or begun elsewhere each round, has everyone run in the wake of the same neighbour nearly
    always, on caches as that one leaves them: what followed nn.Conv2d lost up to a fifth of its speed to that.
    """
    generator = random.Random(rounds)
    for _ in range(rounds):
        yield generator.sample(competitors, len(competitors))
