"""Accuracy at equal budget: ResNet-20 with each competitor on the digits; same data, recipe, epochs; several seeds."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import nn

from benchmarks.comparison.rounds import Effort, compare
from benchmarks.dense_init import train
from benchmarks.peers import TITLES, build_network, count_macs, count_parameters
from benchmarks.peers.catalogue import VARIANTS
from spconv_triton.training.data import WEIGHTS, seed_epoch
from spconv_triton.training.datasets import digits
from spconv_triton.training.measure import forward_pass

Row = dict[str, Any]

NETWORK = "resnet20"
SIZE = 16
"""Pixels that the 8 x 8 digits are enlarged to."""

LEARNING_RATE = 0.1

ALPHAS = {"spconv": 1 / 2, "spconv 1/4": 1 / 4, "spconv 1/8": 1 / 8}
"""SPConv at more than one size; the reference computes the same and is left out."""

CANDIDATES = {
    **{name: title for name, title in TITLES.items() if name != "reference" and not name.endswith(VARIANTS)},
    "spconv 1/4": "SPConv, alpha 1/4",
    "spconv 1/8": "SPConv, alpha 1/8",
}


def build(name: str) -> nn.Module:
    competitor = "spconv" if name in ALPHAS else name
    return build_network(NETWORK, competitor, alpha=ALPHAS.get(name, 0.5), in_channels=1)


def measure(
    epochs: int,
    seeds: int,
    effort: Effort,
    *,
    samples: int | None = None,
    processes: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Rows with test accuracy in %, parameters, MACs and seconds per batch of 1 and of 64 images.

    Args:
        samples: training images to keep; None keeps all.
        processes: that train at a time, one thread each. Times are taken afterwards, on one thread.
    """
    jobs = [(name, seed, epochs, samples) for name in CANDIDATES for seed in range(seeds)]
    accuracies: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for (name, seed, *_), accuracy in zip(jobs, _train_all(jobs, processes), strict=True):
        accuracies[name].append(accuracy)
        progress(f"{CANDIDATES[name]}, seed {seed}: {accuracy:.2f} %")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = {name: _sizes(name) for name in CANDIDATES}
        for key, batch in (("latency", 1), ("latency_64", 64)):
            images = torch.randn(batch, 1, SIZE, SIZE).to(memory_format=torch.channels_last)
            calls = {name: forward_pass(build(name).to(memory_format=torch.channels_last), images) for name in rows}
            for call in calls.values():
                call()
            for name, timing in compare(calls, effort).items():
                rows[name] |= {key: timing.seconds, f"{key}_rounds": timing.rounds}
    finally:
        torch.set_num_threads(threads)
    for name, row in rows.items():
        own = accuracies[name]
        row |= {"accuracies": own, "mean": statistics.fmean(own), "spread": statistics.stdev(own) if seeds > 1 else 0.0}
        row |= {"epochs": epochs}
    return list(rows.values())


def _sizes(name: str) -> Row:
    model = build(name)
    return {"name": name, "parameters": count_parameters(model), "macs": count_macs(model, (1, 1, SIZE, SIZE))}


def _train_all(jobs: Sequence[tuple[str, int, int, int | None]], processes: int) -> Any:
    if processes == 1:
        return map(_train, jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(_train, jobs))


def _train(job: tuple[str, int, int, int | None]) -> float:
    """Test accuracy in % after the last epoch."""
    name, seed, epochs, samples = job
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seed_epoch(seed, WEIGHTS)
        return train(build(name), digits(SIZE, samples), epochs, LEARNING_RATE, seed)[-1]
    finally:
        torch.set_num_threads(threads)
