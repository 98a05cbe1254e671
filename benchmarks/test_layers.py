"""``pytest benchmarks/test_layers.py --benchmark-only``: the peers, one group per shape, batch and direction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case

from benchmarks.comparison import subjects
from benchmarks.comparison.layers import cells, is_stage
from benchmarks.competitors import DEVICE, DIRECTIONS
from benchmarks.peers import NAMES, NETWORKS
from benchmarks.peers.catalogue import COMPILED, KEPT
from benchmarks.ratios import quantiles

SHAPES = {
    f"{cell.network}, {cell.case}": cell.case
    for cell in cells(NETWORKS, (1,), DIRECTIONS[:1], torch.float32, stages_only=True)
}


@pytest.mark.skipif(DEVICE != "cpu", reason="float32 would be TF32 on a GPU; make gpu times layers there")
@pytest.mark.benchmark(max_time=0.3, min_rounds=5)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_layer(benchmark: Any, case: Case, batch: int, direction: str, name: str) -> None:
    if name.endswith(COMPILED) and not is_stage(case):
        pytest.skip("compiled for ResNet-50's four stages only: it takes seconds each")
    if name.endswith(KEPT) and direction != DIRECTIONS[1]:
        pytest.skip("nothing is kept without a backward")
    if name.endswith(COMPILED):
        torch.compiler.reset()  # else Dynamo gives up after a few sizes of one forward
    subject = subjects.find_best(replace(case, batch=batch), name, direction, torch.float32)
    benchmark.group = f"{case}, N = {batch}, {direction}"
    macs = batch * subjects.macs(replace(case, batch=1), name) * (1 if direction == DIRECTIONS[0] else 3)
    benchmark.extra_info |= {"layout": subject.layout, "macs": macs}
    benchmark(subject.call(direction))
    if benchmark.stats is None:  # --benchmark-disable: the result was checked, nothing was timed
        return
    p20, p50, p80 = quantiles(benchmark.stats.stats.data)
    benchmark.extra_info |= {"p20_ms": 1e3 * p20, "p50_ms": 1e3 * p50, "p80_ms": 1e3 * p80}
