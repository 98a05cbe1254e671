"""Competitors take turns: how often, in which order, and which of a few is the fastest."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

One = TypeVar("One")

CHOICE_SECONDS = 0.005
"""A sample repeats its call until it takes about this long, where one of two is chosen."""


def round_count(text: str) -> int:
    """``--rounds`` of a command line: enough for quantiles."""
    if not (text.isdecimal() and int(text) >= 2):
        raise argparse.ArgumentTypeError(f"must be an integer of at least 2, for quantiles, got {text!r}")
    return int(text)


def turns(competitors: Sequence[One], rounds: int) -> Iterator[list[One]]:
    """Every competitor once a round, each round in an order of its own, the same in every run.

    An order that is kept, or begun elsewhere each round, has everyone run in the wake of the same neighbour nearly
    always, on caches as that one leaves them: what followed nn.Conv2d lost up to a fifth of its speed to that.
    """
    generator = random.Random(rounds)
    for _ in range(rounds):
        yield generator.sample(competitors, len(competitors))


def fastest(calls: Mapping[str, Callable[[], object]], rounds: int = 8) -> str:
    """By the fastest of a few short samples, taken in turns: enough to choose a memory format by, not to report.

    Single calls of some 50 us are not: one disturbed moment took the slower format of two layers, and a tenth of the
    choices were wrong on a busy machine where one format was tried after the other.
    """
    if len(calls) == 1:
        return next(iter(calls))
    best = {name: seconds_of(call, 1) for name, call in calls.items()}
    repeats = {name: max(1, round(CHOICE_SECONDS / max(once, 1e-9))) for name, once in best.items()}
    for order in turns(list(calls), rounds):
        for name in order:
            best[name] = min(best[name], seconds_of(calls[name], repeats[name]))
    return min(best, key=lambda name: best[name])


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Of one of so many calls after each other."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
