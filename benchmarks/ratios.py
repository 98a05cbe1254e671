"""``python -m benchmarks.ratios``: how many times faster than eager nn.Conv2d, as a Markdown table.

The competitors take turns within each round, so that whatever slows the machine down for a while slows all of them:
the ratio of a round is taken within it, and the table gives the median of the rounds and their 20 % and 80 % quantiles.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from cases import RESNET50, Case

from benchmarks.competitors import DEVICE, DIRECTIONS, DTYPE, NAMES, Competitor, build, count_macs, with_batch
from benchmarks.peers.catalogue import COMPILED, KEPT
from benchmarks.turns import round_count, seconds_of, turns
from spconv_triton.training.cli import count

COMPILED_TOO = (f"conv2d{COMPILED}", f"reference{COMPILED}", f"native{COMPILED}")

BOTH_COMPILED = "native / conv2d, both compiled"
"""Against compiled nn.Conv2d; every other column is against the eager one."""

KEPT_TOO = (f"native{KEPT}",)
"""With a backward."""

SAMPLE_SECONDS = 0.02
"""A sample repeats its call until it takes about this long: the clock and the loop then cost nothing."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ratios", description="SPConv2d against nn.Conv2d")
    parser.add_argument("--rounds", type=round_count, default=25, help="rounds per row (default: %(default)s)")
    parser.add_argument("--batches", type=count, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument(
        "--threads", type=count, default=torch.get_num_threads(), help="of a CPU (default: %(default)s)"
    )
    parser.add_argument("--compiled", action="store_true", help="all of them through torch.compile too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    names = (*NAMES, *KEPT_TOO, *(COMPILED_TOO if options.compiled else ()))
    print(f"{machine()}; {options.rounds} rounds; {datetime.datetime.now(datetime.timezone.utc).date()}\n")
    others = (*names[1:], *([BOTH_COMPILED] if options.compiled else []))
    print("| layer | N | direction | conv2d ms |", *(f"{name} x |" for name in others), "MACs x |")
    print("|---|---|---|---|" + "---|" * (len(others) + 1))
    medians: dict[tuple[str, int, str], list[float]] = {}
    for direction in DIRECTIONS:
        for case in (with_batch(case, batch) for batch in options.batches for case in RESNET50):
            milliseconds, ratios = measure(case, direction, options.rounds, names)
            cells = []
            for name in others:
                if name not in ratios:
                    cells.append("")
                    continue
                p20, p50, p80 = quantiles(ratios[name])
                medians.setdefault((direction, case.batch, name), []).append(p50)
                cells.append(f"{p50:.2f} ({p20:.2f} to {p80:.2f})")
            bound = count_macs(case, "conv2d", direction) / count_macs(case, "native", direction)
            row = [case.name, str(case.batch), direction, f"{milliseconds:.2f}", *cells, f"{bound:.2f}"]
            print("|", " | ".join(row), "|", flush=True)
    for direction in DIRECTIONS:
        for batch in options.batches:
            found = (medians.get((direction, batch, name)) for name in others)
            means = [f"{statistics.geometric_mean(values):.2f}" if values else "" for values in found]
            print(f"| geometric mean | {batch} | {direction} | |", " | ".join(means), "| |")


def measure(
    case: Case, direction: str, rounds: int, names: Sequence[str] = NAMES
) -> tuple[float, dict[str, list[float]]]:
    """Median milliseconds of eager nn.Conv2d, and per competitor its speed in each round as a multiple of that one's.

    Where both run compiled, :data:`BOTH_COMPILED` too.
    """
    torch.compiler.reset()
    field = [build(case, name, direction) for name in names if direction == DIRECTIONS[1] or name not in KEPT_TOO]
    seconds = seconds_in_turns(field, rounds)
    dense = seconds["conv2d"]
    ratios = {name: [d / s for d, s in zip(dense, own, strict=True)] for name, own in seconds.items()}
    theirs, ours = (seconds.get(f"{name}{COMPILED}") for name in ("conv2d", "native"))
    if theirs and ours:
        ratios[BOTH_COMPILED] = [t / o for t, o in zip(theirs, ours, strict=True)]
    return 1e3 * statistics.median(dense), ratios


def seconds_in_turns(field: Sequence[Competitor], rounds: int) -> dict[str, list[float]]:
    """What a call takes of each, by name and in the order of the field, in every round."""
    repeats = {competitor.name: repeats_of(competitor) for competitor in field}
    seconds: dict[str, list[float]] = {competitor.name: [] for competitor in field}
    for order in turns(field, rounds):
        for competitor in order:
            seconds[competitor.name].append(seconds_of(competitor.call, repeats[competitor.name]))
    return seconds


def repeats_of(competitor: Competitor) -> int:
    return max(1, round(SAMPLE_SECONDS / seconds_of(competitor.call, 3)))


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 %."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[1], deciles[4], deciles[7]


def machine(device: str = DEVICE, dtype: torch.dtype = DTYPE) -> str:
    """What the figures were taken on; a load above 0 before the first of them is somebody else's."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}; {versions}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    features = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    load = f"load {os.getloadavg()[0]:.1f}"
    return f"{model}, {os.cpu_count()} cores, {features}, {threads} thread{'s'[: threads > 1]}, {load}; {versions}"


if __name__ == "__main__":
    main()
