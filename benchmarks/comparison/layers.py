"""The layer benchmark: every competitor on the convolutions of three networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import Case

from benchmarks.comparison import subjects
from benchmarks.comparison.rounds import Effort, compare
from benchmarks.competitors import DIRECTIONS
from benchmarks.networks import convolutions
from benchmarks.peers import NAMES
from benchmarks.peers.catalogue import COMPILED, KEPT

Row = dict[str, Any]

STAGES = ("64 to 64, 56", "128 to 128, 28", "256 to 256, 14", "512 to 512, 7")
"""ResNet-50's four convolutions without a stride, by how their names begin: what speed claims are made on."""


@dataclass(frozen=True)
class Cell:
    """One comparison: all competitors on one shape.

    Attributes:
        network: whose convolution it is.
        case: its shape, with the batch.
        compiled: who runs compiled too, which takes seconds to prepare.
    """

    network: str
    case: Case
    direction: str
    dtype: torch.dtype
    compiled: tuple[str, ...] = ()

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.network}: {self.case}, N = {self.case.batch}, {kind}, {self.direction}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in NAMES if self._runs(name))

    def _runs(self, name: str) -> bool:
        if name.endswith(COMPILED):
            return name.removesuffix(COMPILED) in self.compiled
        return self.direction == DIRECTIONS[1] or not name.endswith(KEPT)


def shapes(network: str) -> tuple[Case, ...]:
    """The convolutions that SPConv replaces, each shape once."""
    return tuple(found.case for found in convolutions(network) if found.replaced)


def is_stage(case: Case) -> bool:
    return case.stride == (1, 1) and any(case.name.startswith(f"3 x 3, {stage} x") for stage in STAGES)


def cells(
    networks: Sequence[str],
    batches: Sequence[int],
    directions: Sequence[str],
    dtype: torch.dtype,
    *,
    stages_only: bool,
    compiled: Mapping[tuple[str, int], tuple[str, ...]] | None = None,
) -> tuple[Cell, ...]:
    """Comparisons.

    Args:
        stages_only: of each network only the convolutions without a stride that keep the number of channels.
        compiled: who runs compiled too on ResNet-50's four stages, by direction and batch.
    """
    return tuple(
        Cell(
            network,
            replace(case, batch=batch),
            direction,
            dtype,
            (compiled or {}).get((direction, batch), ()) if network == "resnet50" and is_stage(case) else (),
        )
        for network in networks
        for case in shapes(network)
        if not stages_only or (case.stride == (1, 1) and case.in_channels == case.out_channels)
        for batch in batches
        for direction in directions
    )


def measure(cell: Cell, effort: Effort) -> list[Row]:
    """A row for each competitor; one whose result is wrong has an ``error`` and no times."""
    head = {
        "network": cell.network,
        "layer": cell.case.name,
        "batch": cell.case.batch,
        "dtype": str(cell.dtype).removeprefix("torch."),
        "direction": cell.direction,
    }
    rows: dict[str, Row] = {}
    ready: dict[str, subjects.Subject] = {}
    for name in cell.names:
        rows[name] = {**head, "name": name, "macs": subjects.macs(cell.case, name)}
        try:
            ready[name] = subjects.find_best(cell.case, name, cell.direction, cell.dtype)
        except (AssertionError, RuntimeError) as error:
            rows[name]["error"] = str(error).partition("\n")[0]
    timings = compare({name: subject.call(cell.direction) for name, subject in ready.items()}, effort)
    for name, timing in timings.items():
        rows[name] |= {"layout": ready[name].layout, "seconds": timing.seconds, "rounds": timing.rounds}
        if "conv2d" in timings:
            rows[name]["speed"] = timing.speeds
        rows[name]["peak_bytes"] = ready[name].peak_bytes(cell.direction)
        if cell.direction == DIRECTIONS[1]:
            rows[name]["kept_bytes"] = ready[name].kept_bytes()
    if any(name.endswith(COMPILED) for name in cell.names):
        torch.compiler.reset()
    return list(rows.values())
