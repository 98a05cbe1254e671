"""``python -m benchmarks.comparison``: measures, and writes ``benchmarks/REPORT.md`` with its pictures.

Results so far are saved after each section, in ``runs/bench/results.json``; ``--page`` writes the page from them again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison import accuracy, layers, networks
from benchmarks.comparison.page import write_page
from benchmarks.comparison.plan import Plan, full, quick, rehearsal
from benchmarks.competitors import DEVICE
from benchmarks.files import write
from benchmarks.ratios import machine
from benchmarks.turns import round_count
from spconv_triton.training.cli import count

SECTIONS = ("layers", "networks", "accuracy")
PLANS = {"quick": quick, "full": full, "rehearsal": rehearsal}
HERE = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a competitor's result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison", description="SPConv and its peers")
    parser.add_argument("--mode", choices=PLANS, default="quick", help="(default: %(default)s)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="(default: all)")
    parser.add_argument("--rounds", type=round_count, help="at most, for a quick look")
    parser.add_argument(
        "--threads", type=count, default=torch.get_num_threads(), help="of a CPU (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder of REPORT.md (default: benchmarks)")
    parser.add_argument("--results", type=Path, default=Path("runs/bench/results.json"), help="(default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page from --results")
    options = parser.parse_args(arguments)
    is_part = options.mode == "rehearsal" or options.rounds or {*options.sections} != {*SECTIONS}
    if is_part and not options.page and options.out == HERE:
        parser.error("--out must be another folder than that of the whole page, which a part of it would replace")
    if DEVICE != "cpu" and not options.page:
        parser.error("float32 would be TF32 on a GPU: hide it (CUDA_VISIBLE_DEVICES=); make gpu times a GPU")
    if options.page:
        try:
            results = json.loads(options.results.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"--results {options.results} cannot be read: {error}")
    else:
        torch.set_num_threads(options.threads)
        plan = PLANS[options.mode]()
        if options.rounds:
            plan = plan.at_most(options.rounds)
        results = measure(plan, options.sections, options.results, options.threads)
    print(write_page(results, options.out))
    wrong = [row for section in ("layers", "networks") for row in results.get(section, ()) if "error" in row]
    for row in wrong:
        print(f"not timed: {row['network']}, {row['name']}: {row['error']}", file=sys.stderr)
    return int(bool(wrong))


def measure(plan: Plan, sections: Sequence[str], file: Path, threads: int) -> dict[str, Any]:
    """All sections, saved after each."""
    start = time.perf_counter()
    full_mode = " FULL=1" if plan.name == "full" else ""
    known = sys.argv[1:] == ["--mode", plan.name] and plan.name in ("quick", "full")
    results: dict[str, Any] = {
        "plan": plan.name,
        "command": f"make bench{full_mode}" if known else f"python -m benchmarks.comparison {' '.join(sys.argv[1:])}",
        "date": str(datetime.datetime.now(datetime.timezone.utc).date()),
        "machine": machine(),
    }

    def say(text: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {text}", file=sys.stderr, flush=True)

    for section in sections:
        MEASURES[section](plan, results, threads, say)
        results["minutes"] = (time.perf_counter() - start) / 60
        write(file, json.dumps(results))
    return results


def _layers(plan: Plan, results: dict[str, Any], _threads: int, say: Any) -> None:
    results["layers"] = []
    for cell in plan.cells:
        say(str(cell))
        results["layers"] += layers.measure(cell, plan.layer)


def _networks(plan: Plan, results: dict[str, Any], _threads: int, say: Any) -> None:
    results["networks"], results["sizes"] = [], []
    for network in dict.fromkeys(load.network for load in plan.loads):
        built = networks.Networks(network, plan.size)
        results["sizes"] += built.sizes()
        for load in plan.loads:
            if load.network == network:
                say(str(load))
                results["networks"] += built.measure(load, plan.network)


def _accuracy(plan: Plan, results: dict[str, Any], threads: int, say: Any) -> None:
    say(f"training ResNet-20 on the digits, {plan.epochs} epochs, {plan.seeds} seeds")
    processes = max(1, min(threads, os.cpu_count() or 1))
    results["accuracy"] = accuracy.measure(
        plan.epochs, plan.seeds, plan.latency, samples=plan.samples, processes=processes, progress=say
    )


MEASURES = {"layers": _layers, "networks": _networks, "accuracy": _accuracy}

if __name__ == "__main__":
    sys.exit(main())
