"""``python -m benchmarks.static``: what the compiler made of every kernel, for GPUs that need not be there.

Compiles what of the matrix has changed since the report was saved, prints a row per kernel, configuration and target,
and saves JSON (a row per compiled kernel) and Markdown. Everything is counted in machine code; nothing is run.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import triton

from benchmarks import matrix
from benchmarks.files import write
from benchmarks.machine_code import TARGETS
from benchmarks.machine_code_gate import complaints
from benchmarks.matrix import Compilation
from benchmarks.measurements import Row, load, measure_all, save
from benchmarks.processors import KIB
from spconv_triton.training.cli import count

REPORT = Path(__file__).parent / "results" / "static.json"

SAVE_SECONDS = 30
"""How much work an interruption may cost."""

LONGER = 1.05
"""A hot loop may grow by so much before it counts as worse."""

FEWER = 0.8
"""So many of the programs on a processor have to stay, or it counts as worse."""

HEAD = (
    "kernel | tile | target | rows | registers | spilled B | shared KiB | programs | products | TMA load + store"
    " | step | issue / tensor"
)

LEGEND = f"""\
Static: compiled by Triton {triton.__version__} and counted in machine code; nothing was run. A row is a kernel, a tile
and a target, over all layers and dtypes of the matrix that it is compiled for, as a range where they differ.

- *rows*: how many compiled kernels; *registers* and *spilled* bytes of a thread; *shared* memory of a program.
- *programs*: how many share a processor, by registers, shared memory, warps and tensor memory
  (`benchmarks/processors.py`).
- *products*: instructions of the tensor cores in all; *TMA*: loads and stores of whole boxes.
- *step*: instructions of a warp in a step of the hot loop, the one that multiplies most.
- *issue / tensor*: cycles in which four schedulers issue a step, and that the tensor cores need for its products (of
  sm_80 and sm_90; elsewhere the instructions do not tell).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    parser.add_argument("--kernel", action="append", help="only kernels whose name holds this; may be repeated")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this target; may be repeated")
    parser.add_argument("--against", type=Path, metavar="FILE", help="print what changed since this JSON report")
    parser.add_argument("--rows", action="store_true", help="print each compiled kernel")
    parser.add_argument("--fresh", action="store_true", help="compile what has not changed as well")
    parser.add_argument("--report", type=Path, default=REPORT, metavar="FILE", help="read and written: %(default)s")
    parser.add_argument("--jobs", type=count, default=os.cpu_count(), help="processes (default: %(default)s)")
    options = parser.parse_args(arguments)

    def wanted(one: Row | Compilation) -> bool:
        return (options.target is None or one.target in options.target) and (
            options.kernel is None or any(part in one.kernel for part in options.kernel)
        )

    before = [row for row in load(options.against) if wanted(row)] if options.against else None
    rows = update(options.report, wanted, options.jobs, options.fresh)
    found = [row for row in rows if wanted(row)]
    print(LEGEND)
    print(table(found) if not options.rows else "\n".join(map(describe, found)))
    wrong = complaints(found)
    for complaint in wrong:
        print(complaint)
    if before is None:
        return int(bool(wrong))
    changed = changes(before, found)
    for change in changed:
        print(change)
    worse = sum(change.worse for change in changed)
    print(f"against {options.against}: {len(changed)} rows differ, {worse} of them for the worse")
    return int(bool(wrong or worse))


def update(path: Path, wanted: Callable[[Compilation], bool], jobs: int, fresh: bool) -> list[Row]:
    """Bring the wanted rows of a report up to date, compiling those whose fingerprint is not in it, and save it.

    What is not wanted stays as it was saved; what the matrix no longer has is dropped.
    """
    everything = list(matrix.compilations())
    saved = {row.fingerprint: row for row in load(path)} if path.exists() else {}
    stale = {row.identity: row for row in saved.values()}
    kept: dict[str, Row] = {}
    missing = []
    for one in everything:
        if one.fingerprint in saved and not (fresh and wanted(one)):
            kept[one.fingerprint] = Row(*one.identity, *saved[one.fingerprint][6:])
        elif wanted(one):
            missing.append(one)
        elif one.identity in stale:
            kept[one.fingerprint] = stale[one.identity]
    if missing:
        last = start = time.monotonic()
        for done, row in enumerate(measure_all(missing, min(jobs, len(missing))), 1):
            kept[row.fingerprint] = row
            if time.monotonic() - last > SAVE_SECONDS or done == len(missing):
                last = time.monotonic()
                save(path, kept.values())
                print(f"{done} of {len(missing)} compiled, {last - start:.0f} s", file=sys.stderr, flush=True)
    rows = sorted(kept.values())
    save(path, rows)
    write(path.with_suffix(".md"), f"# Machine code\n\n{LEGEND}\n{table(rows)}\n")
    return rows


def table(rows: Iterable[Row]) -> str:
    """Markdown: a row per kernel, tile and target."""

    def key(row: Row) -> tuple[str, ...]:
        return row.kernel, row.tile, row.target

    lines = [f"| {HEAD} |", "|" + "---|" * (HEAD.count("|") + 1)]
    for name, group in itertools.groupby(sorted(rows, key=key), key):
        lines.append("| " + " | ".join([*name, *_cells(list(group))]) + " |")
    return "\n".join(lines)


def describe(row: Row) -> str:
    """One compiled kernel, in a line."""
    registers, spilled, shared, programs, products, tma, step, cycles = _cells([row])[1:]
    loop = f"; step: {step} instructions ({row.loop_products}), issue / tensor {cycles}" if row.loop else ""
    return (
        f"{row}: {registers} registers, {spilled} B spilled, {shared} KiB, {programs} programs, {products} products, "
        f"TMA {tma}{loop}"
    )


def _cells(rows: Sequence[Row]) -> list[str]:
    good = [row for row in rows if not row.error]
    if not good:
        return [str(len(rows)), *["does not compile"], *[""] * 7]

    def span(values: Iterable[float | None]) -> str:
        known = sorted(value for value in values if value is not None)
        if not known:
            return ""
        low, high = (f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in (known[0], known[-1]))
        return low if low == high else f"{low} to {high}"

    loads, stores = span(row.tma_loads for row in good), span(row.tma_stores for row in good)
    issue, tensor = span(row.issue_cycles for row in good), span(row.tensor_cycles for row in good)
    return [
        str(len(rows)),
        span(row.registers for row in good),
        span(row.spilled_bytes for row in good),
        span(row.shared_bytes / KIB for row in good),
        span(row.programs for row in good),
        span(row.products for row in good),
        "" if loads == stores == "0" else f"{loads} + {stores}",
        span(row.loop or None for row in good),
        f"{issue} / {tensor}" if tensor else issue,
    ]


class Change(NamedTuple):
    """What became of a row."""

    name: str
    what: str
    worse: bool

    def __str__(self) -> str:
        return f"{'WORSE ' if self.worse else ''}{self.name}: {self.what}"


def changes(before: Iterable[Row], after: Iterable[Row]) -> list[Change]:
    """What differs between two reports, by name.

    A row is worse if it no longer compiles, spills more, leaves room for less than four fifths of the programs on a
    processor, has lost tensor or descriptor instructions from its hot loop, or a hot loop longer by more than a
    twentieth. A new row is worse if it does not compile or spills.
    """
    old, new = ({row.identity: row for row in rows} for rows in (before, after))
    found = []
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if was is None and now is not None:
            found.append(Change(str(now), "new", bool(now.error or now.spilled_bytes)))
        elif was is not None and now is None:
            found.append(Change(str(was), "gone", False))
        elif was is not None and now is not None and (differences := list(_differences(was, now))):
            found.append(Change(str(now), ", ".join(text for text, _ in differences), any(w for _, w in differences)))
    return found


def _differences(was: Row, now: Row) -> Iterator[tuple[str, bool]]:
    if was.error or now.error:
        if was.error != now.error:
            yield (f"does not compile: {now.error}", True) if now.error else ("compiles", False)
        return
    for label, old, new, worse in (
        ("registers", was.registers, now.registers, False),
        ("spilled bytes", was.spilled_bytes, now.spilled_bytes, now.spilled_bytes > was.spilled_bytes),
        ("shared bytes", was.shared_bytes, now.shared_bytes, False),
        ("programs", was.programs, now.programs, now.programs < FEWER * was.programs),
        ("instructions a step", was.loop, now.loop, now.loop > LONGER * was.loop),
        ("products", was.loop_products, now.loop_products, bool(was.tensor_products) > bool(now.tensor_products)),
        ("TMA loads a step", was.loop_tma_loads, now.loop_tma_loads, now.loop_tma_loads < was.loop_tma_loads),
    ):
        if old != new:
            yield f"{label} {old or 'none'} -> {new or 'none'}", worse


if __name__ == "__main__":
    sys.exit(main())
