"""Timing in turns: what slows the machine down for a while slows all of them, and ratios are taken within a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.allocator import settle
from benchmarks.ratios import SAMPLE_SECONDS, quantiles
from benchmarks.turns import seconds_of, turns


@dataclass(frozen=True)
class Effort:
    """How long to time.

    Attributes:
        seconds: for all rounds of one comparison.
        fewest, most: rounds, however long they take.
        sample: seconds of a sample.
    """

    seconds: float
    fewest: int = 5
    most: int = 21
    sample: float = SAMPLE_SECONDS

    def rounds(self, seconds_of_one: float) -> int:
        return max(self.fewest, min(self.most, int(self.seconds / max(seconds_of_one, 1e-9))))


@dataclass(frozen=True)
class Timing:
    """Of one call among others: 20, 50 and 80 % quantiles over the rounds.

    Attributes:
        seconds: of a call.
        speeds: how many times faster than the first of the others, round by round.
        rounds: how many.
    """

    seconds: tuple[float, float, float]
    speeds: tuple[float, float, float]
    rounds: int


def take_turns(calls: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, list[float]]:
    """Seconds of each call, round by round. Every call must have run before."""
    settle()
    names = list(calls)
    repeats, together = {}, 0.0
    for name in names:
        once = min(seconds_of(calls[name], 1) for _ in range(2 if effort.sample else 1))
        repeats[name] = max(1, round(effort.sample / max(once, 1e-9)))
        together += once * repeats[name]
    taken: dict[str, list[float]] = {name: [] for name in names}
    for order in turns(names, effort.rounds(together)):
        for name in order:
            taken[name].append(seconds_of(calls[name], repeats[name]))
    return taken


def compare(calls: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, Timing]:
    """Times of each, and its speed against the first; nothing of nobody."""
    if not calls:
        return {}
    taken = take_turns(calls, effort)
    first = taken[next(iter(calls))]
    return {
        name: Timing(quantiles(own), quantiles([base / s for base, s in zip(first, own, strict=True)]), len(own))
        for name, own in taken.items()
    }
