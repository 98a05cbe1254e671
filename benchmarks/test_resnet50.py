"""``pytest benchmarks/test_resnet50.py --benchmark-only``: the library's paths, by shape, batch and direction."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from cases import RESNET50, Case

from benchmarks.competitors import DIRECTIONS, build, with_batch

NAMES = (
    "conv2d",
    "reference",
    "native",
    pytest.param("triton", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_layer(benchmark: Any, case: Case, batch: int, direction: str, name: str) -> None:
    competitor = build(with_batch(case, batch), name, direction)
    benchmark.group = f"{case}, N = {batch}, {direction}"
    benchmark.extra_info |= {"layout": competitor.layout, "macs": competitor.macs}
    benchmark(competitor.call)
    if benchmark.stats is None:  # --benchmark-disable: the result was checked, nothing was timed
        return
    seconds = benchmark.stats.stats.data
    p20, p50, p80 = (statistics.quantiles(seconds, n=10, method="inclusive")[i] for i in (1, 4, 7))
    benchmark.extra_info |= {"p20_ms": 1e3 * p20, "p50_ms": 1e3 * p50, "p80_ms": 1e3 * p80}
    benchmark.extra_info["gflop_per_s"] = 2e-9 * competitor.macs / p50
