"""One of two revisions under ``benchmarks.comparison.compare``: times what it is told to, when it is told to.

Reads a JSON line for each order and answers with one. ``{"open": i}`` builds comparison i of the plan, checks it, and
answers with its name; ``{"round": true}`` answers with seconds of a call of each competitor; ``{"where": true}`` with
the file of the library that is timed. Ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

import spconv_triton
from benchmarks.comparison import subjects
from benchmarks.comparison.plan import large, quick, rehearsal
from benchmarks.ratios import SAMPLE_SECONDS
from benchmarks.turns import seconds_of

PLANS = {"quick": quick, "large": large, "rehearsal": rehearsal}

NAMES = ("conv2d", "spconv")
"""The first is the same code in both revisions: how it differs is noise."""


def main() -> None:
    plan, sample = PLANS[sys.argv[1]](), float(sys.argv[2]) if len(sys.argv) > 2 else SAMPLE_SECONDS
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    torch.set_num_threads(int(os.environ.get("PROBE_THREADS", torch.get_num_threads())))
    calls: dict[str, Callable[[], object]] = {}
    repeats: dict[str, int] = {}
    for line in sys.stdin:
        order = json.loads(line)
        answer: Any
        if "where" in order:
            answer = spconv_triton.__file__
        elif "open" in order:
            cell = plan.cells[order["open"]] if order["open"] < len(plan.cells) else None
            answer = None if cell is None else str(cell)
            if cell is not None:
                for name in NAMES:
                    subject = subjects.find_best(cell.case, name, cell.direction, cell.dtype)
                    calls[name] = subject.call(cell.direction)
                    once = min(seconds_of(calls[name], 1) for _ in range(3))
                    repeats[name] = max(1, round(sample / max(once, 1e-9)))
        else:
            seconds_of(calls[NAMES[0]], repeats[NAMES[0]])  # meanwhile the threads of the other process go to sleep
            answer = {name: seconds_of(calls[name], repeats[name]) for name in NAMES}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
