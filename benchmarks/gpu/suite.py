"""The kernels' own tests, natively on the device, on every core: compiling takes most of their time."""

from __future__ import annotations

import concurrent.futures
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.record import Record

ROOT = Path(__file__).parents[2]

REHEARSED = "test_gradients_accumulate"

RESULT = re.compile(r"^(tests/\S+?::.+) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
SUMMARY = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?::.+?) - (.*)$")
SKIPPED = re.compile(r"^SKIPPED \[(\d+)\] \S+: (.*)$")

PYTEST = (
    *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
    # Of the project's own options none but the paths: a warning of another PyTorch's is no failure of a kernel.
    *("-o", "addopts=", "-o", "filterwarnings=default", "-p", "benchmarks.gpu.untuned"),
    "--every",  # a process draws cases of its own, which the one that listed the tests knows nothing of
)

MARGIN = 8.0
"""Seconds before its time is up that the section ends itself."""


def kernels(record: Record) -> None:
    """``pytest tests/kernels``, shared out among processes; every test is a check of the report."""
    start = time.monotonic()
    chosen = ("-k", REHEARSED) if record.rehearsal else ()
    listed = _pytest("--collect-only", "-q", *chosen, "tests/kernels")
    names = [line for line in listed.splitlines() if line.startswith("tests/")]
    with record.check("tests are found"):
        assert names, listed
    workers = min(len(names), os.cpu_count() or 1, 2 if record.rehearsal else 14)
    deadline = start + float(os.environ.get("SPCONV_GPU_SECONDS", "3600")) - MARGIN
    # Dealt out at random: whatever the time is enough for is a sample of all.
    random.Random(len(names)).shuffle(names)
    with concurrent.futures.ThreadPoolExecutor(max(workers, 1)) as pool:
        for done in pool.map(lambda part: _run(record, part, deadline), (names[i::workers] for i in range(workers))):
            for reason, count in done.items():
                record.note(f"{count} {reason}")


def _run(record: Record, names: Sequence[str], deadline: float) -> dict[str, int]:
    """Runs some tests, writing each one's result down as it comes, until ``deadline``.

    Returns:
        How many were skipped or not reached, by reason.
    """
    process = subprocess.Popen(
        [*PYTEST, "-v", "-rfEs", "--tb=short", *names],
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), process.kill)
    timer.start()
    failed: dict[str, str] = {}
    skipped: dict[str, int] = {}
    missing = dict.fromkeys(names)
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if result := RESULT.match(line):
            missing.pop(result[1], None)
            if result[2] in ("FAILED", "ERROR", "XPASS"):
                failed[result[1]] = ""
            elif result[2] == "PASSED":
                record.passed(result[1])
        elif summary := SUMMARY.match(line):
            failed[summary[1]] = summary[2]
        elif skip := SKIPPED.match(line):
            reason = f"skipped: {skip[2]}"
            skipped[reason] = skipped.get(reason, 0) + int(skip[1])
    process.wait()
    timer.cancel()
    if missing and time.monotonic() >= deadline:
        skipped["not reached in time"] = len(missing)
        missing.clear()
    for name, message in failed.items():
        record.failed(name, message or "failed; see the output below")
    if missing:
        record.failed(f"{len(missing)} tests without a result", f"pytest ended with {process.returncode}")
    if failed or missing:
        record.note("\n".join(lines)[-4000:])
    return skipped


def _pytest(*arguments: str) -> str:
    done = subprocess.run(
        [*PYTEST, *arguments],
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout


def _environment() -> dict[str, str]:
    """No plugins but pytest's own: they are whatever happens to be installed. Lines as long as they are."""
    return os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "500"}
