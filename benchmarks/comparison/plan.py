"""What is measured in each mode."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.comparison.layers import Cell, cells
from benchmarks.comparison.networks import Load
from benchmarks.comparison.rounds import Effort
from benchmarks.competitors import DIRECTIONS

FORWARD = DIRECTIONS[:1]

COMPILED_QUICK = {(DIRECTIONS[0], batch): ("conv2d", "spconv", "reference") for batch in (1, 8)}
"""Who runs compiled too, by direction and batch: preparing one takes up to ten seconds. nn.Conv2d where SPConv does."""

COMPILED_FULL = {
    **{(DIRECTIONS[0], batch): ("conv2d", "spconv", "reference", "ghost") for batch in (1, 8)},
    **{(DIRECTIONS[1], batch): ("conv2d", "spconv", "reference") for batch in (1, 8)},
}


@dataclass(frozen=True)
class Plan:
    """One mode.

    Attributes:
        cells: layer comparisons.
        loads: network comparisons.
        layer, network, latency: how long each of them is timed.
        epochs, seeds, samples: of the accuracies.
        size: of the images of networks; None takes what each was published for.
    """

    name: str
    cells: tuple[Cell, ...]
    loads: tuple[Load, ...]
    layer: Effort
    network: Effort
    latency: Effort
    epochs: int
    seeds: int
    samples: int | None = None
    size: int | None = None

    def at_most(self, rounds: int) -> Plan:
        """The same with fewer rounds, at least two."""
        few = {
            name: replace(effort, fewest=min(effort.fewest, max(rounds, 2)), most=max(rounds, 2))
            for name, effort in (("layer", self.layer), ("network", self.network), ("latency", self.latency))
        }
        return replace(self, **few)


def quick() -> Plan:
    """Under five minutes on two cores."""
    single = torch.float32
    return Plan(
        "quick",
        (
            *cells(("resnet50",), (1, 8), DIRECTIONS, single, stages_only=True, compiled=COMPILED_QUICK),
            *cells(("resnet20",), (8,), FORWARD, single, stages_only=True),
            *cells(("vgg16",), (8,), FORWARD, single, stages_only=True),
        ),
        (
            Load("resnet20", 1),
            Load("resnet20", 32, step=True),
            Load("vgg16", 1),
            Load("resnet50", 1),
        ),
        layer=Effort(0.8, fewest=5, most=11),
        network=Effort(3, fewest=3, most=9),
        latency=Effort(1, fewest=5, most=11),
        epochs=3,
        seeds=1,
    )


def large() -> Plan:
    """Layers of large batches, for two revisions."""
    found = cells(("resnet50",), (64,), DIRECTIONS, torch.float32, stages_only=False)
    return replace(quick(), name="large", cells=found)


def full() -> Plan:
    """Under forty minutes on two cores."""
    networks = ("resnet50", "resnet20", "vgg16")
    return Plan(
        "full",
        (
            *cells(networks, (1, 8, 64), DIRECTIONS, torch.float32, stages_only=False, compiled=COMPILED_FULL),
            *cells(networks, (1, 8, 64), DIRECTIONS, torch.bfloat16, stages_only=True),
        ),
        (
            Load("resnet20", 1),
            Load("resnet20", 64, compiled=("conv2d", "spconv", "reference")),
            Load("resnet20", 64, step=True),
            Load("vgg16", 1),
            Load("vgg16", 64),
            Load("vgg16", 16, step=True),
            Load("resnet50", 1),
            Load("resnet50", 8, compiled=("conv2d", "spconv", "reference")),
            Load("resnet50", 8, step=True),
        ),
        layer=Effort(1.2, fewest=5, most=11),
        network=Effort(12, fewest=5, most=15),
        latency=Effort(4, fewest=7, most=21),
        epochs=12,
        seeds=5,
    )


def rehearsal() -> Plan:
    """Seconds: shows that it runs, and times nothing worth knowing."""
    once = Effort(0, fewest=2, most=2, sample=0)
    return Plan(
        "rehearsal",
        (
            *cells(("resnet50",), (1,), DIRECTIONS, torch.float32, stages_only=True)[-2:],
            *cells(("resnet20",), (2,), DIRECTIONS, torch.bfloat16, stages_only=True)[:2],
        ),
        (Load("resnet20", 1), Load("resnet20", 2, step=True)),
        layer=once,
        network=once,
        latency=once,
        epochs=1,
        seeds=1,
        samples=64,
    )
