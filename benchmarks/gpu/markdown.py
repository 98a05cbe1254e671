"""The report for readers. What it is made of is beside it in JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.markdown import table

WHAT = {
    "device": "time on the device, from a cold cache",
    "called": "until the result is there, called from Python",
    "graph": "until the result is there, as a CUDA graph",
}

PATHS = {"conv2d": "conv2d", "separate": "separate", "triton": "onepass"}
"""What the model calls a competitor."""

PARTS = {"step": ("forward", "backward"), "forward+backward": ("forward", "backward")}

REHEARSAL = (
    "**A rehearsal, not a measurement**: no GPU, tiny sizes, Triton's interpreter. No number below means anything."
)

LONGEST_NAME = 60

LEGEND = """\
*ms* are medians of interleaved rounds. *x* says how many times as fast as the first column's competitor, taken within
each round: median (20 % to 80 %). `conv2d` is cuDNN's and `reference` the paper's equations in eager PyTorch, each in
the faster memory format; `triton` is the library's one pass, `separate` its kernels with U3 and U1 in memory, `flat`
the one pass on the kernels that any GPU gets. Every layer's result was within its error budget of float64 before it was
timed. *Modelled* are the floors of `benchmarks/floors.py`, for which no GPU has run; a step's is forward + backward.
"""


def markdown(report: dict[str, Any]) -> str:
    sections = report["sections"]
    rows = [row for section in sections for row in section.get("rows", ())]
    facts = {row["name"]: row["value"] for row in of("environment", rows)}
    kind = "measured" if not report["rehearsal"] else "rehearsed"
    lines = [f"# GPU report: {facts.get('device', 'unknown device')}", ""]
    if report["rehearsal"]:
        lines += [REHEARSAL, ""]
    versions = ", ".join(
        f"{name} {facts[name]}" for name in ("torch", "triton", "Python", "CUDA", "cuDNN") if name in facts
    )
    lines += [f"{facts.get('date', '')}; {versions}; revision {facts.get('revision', 'unknown')}.", ""]
    lines += [f"    {report['command']}", ""]
    lines += ["## Outcome", "", *outcome(sections), "", "## Environment", ""]
    lines += table(("", ""), [(name, str(value)) for name, value in facts.items()], words=None)
    if ceilings := of("ceilings", rows):
        lines += ["", *table(("ceiling", kind), [(row["what"], number(row["value"])) for row in ceilings], words=None)]
    if times := of("times", rows):
        lines += ["", "## Times", "", LEGEND, *timings(times, of("model", rows), kind)]
    if found := of("parts", rows):
        lines += ["", "## The kernels of a layer", "", *kernels(found, kind)]
    if found := of("host", rows):
        lines += ["", "## On the host", "", *calls(found, kind)]
    if found := of("tiles", rows):
        lines += ["", "## Tiles", "", *tiles(found, kind)]
    lines += memory(rows, kind)
    if chosen := of("tuning", rows):
        lines += ["", "## What the tuner chose", "", *tuned(chosen, kind)]
    notes = [f"- {section['name']}: {note}" for section in sections for note in section.get("notes", ())]
    if notes:
        lines += ["", "## Notes", "", *notes]
    return "\n".join(lines) + "\n"


def outcome(sections: Sequence[dict[str, Any]]) -> list[str]:
    """A line a section, and what failed."""
    cells = []
    for section in sections:
        checks = section.get("checks", ())
        reason = f": {section['reason']}" if section.get("reason") else ""
        passed = sum(check["passed"] for check in checks)
        status = section["status"] if section["status"] in ("passed", "skipped") else f"**{section['status']}**"
        cells.append((section["title"], status + reason, f"{passed} of {len(checks)}", f"{section['seconds']:.0f}"))
    lines = table(("section", "status", "checks passed", "seconds"), cells, words=None)
    for section in sections:
        for check in section.get("checks", ()):
            if not check["passed"]:
                lines += ["", f"**{section['name']}: {check['check']}**", "", *code(check["message"])]
        if section["status"] in ("crashed", "timed out"):
            lines += [
                "",
                f"**{section['name']} {section['status']}**, its last output:",
                "",
                *code("\n".join(section["output"])),
            ]
    return lines


def timings(times: Sequence[dict[str, Any]], model: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """Two tables for every direction, dtype and kind of time: milliseconds, and ratios."""
    floors = {(*key(row), row["direction"], row["path"]): row["ms"] for row in model}
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in times:
        groups.setdefault((row["yardstick"], row["what"], row["direction"], row["dtype"]), []).append(row)
    lines = []
    for (yardstick, what, direction, dtype), group in groups.items():
        names = list(dict.fromkeys(row["competitor"] for row in group))
        layers = list(dict.fromkeys(key(row) for row in group))
        cell = {(key(row), row["competitor"]): row for row in group}
        modelled = [n for n in names if n in PATHS and any(floor(floors, at, direction, n) for at in layers)]
        head = ["", "N", *(f"{name} ms, {kind}" for name in names), *(f"{name} ms, modelled" for name in modelled)]
        values, ratios = [], []
        for at in layers:
            found = [cell.get((at, name)) for name in names]
            bounds = [floor(floors, at, direction, name) for name in modelled]
            values.append([at[0], str(at[1]), *(number(r and r["ms"][1]) for r in found), *map(number, bounds)])
            dense = floor(floors, at, direction, yardstick)
            ratios.append(
                [at[0], str(at[1]), *map(spread, found[1:]), *(number(dense and b and dense / b) for b in bounds[1:])]
            )
        lines += ["", f"### {direction}, {dtype}: {WHAT[what]}", "", *table(head, values, words=1)]
        head = [
            "",
            "N",
            *(f"{name} x, {kind}" for name in names[1:]),
            *(f"{name} x, modelled" for name in modelled[1:]),
        ]
        lines += ["", *table(head, ratios, words=1)]
    return lines


def key(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["layer"], row["batch"], row["dtype"]


def floor(floors: dict[tuple, float], at: tuple[str, int, str], direction: str, name: str) -> float | None:
    """Milliseconds, or None where the model says nothing."""
    parts = [floors.get((*at, part, PATHS.get(name))) for part in PARTS.get(direction, (direction,))]
    return None if None in parts else sum(parts)


def kernels(rows: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """A line for each call: its kernels in their order."""
    calls: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        calls.setdefault((row["layer"], str(row["batch"]), row["direction"], row["competitor"]), []).append(row)
    cells = [
        (
            *call,
            number(sum(row["us"] for row in own)),
            number(max(row["at"] + row["us"] for row in own)),
            ", ".join(f"{short(r['kernel'])} {number(r['us'])} at {number(r['at'])}" for r in own),
        )
        for call, own in calls.items()
    ]
    about = (
        "By the profiler, each from a cold L2 cache only where it is the first of its call. Some kernels begin before "
        "the one ahead has ended, and wait in it; between others there is a gap: *together* is from the first one's "
        "beginning to the last one's end."
    )
    head = ("", "N", "direction", "competitor", f"sum (us), {kind}", f"together (us), {kind}", "kernels, us")
    return [about, "", *table(head, cells, words=None)]


def calls(rows: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """A line for each call: until it returns, and the functions that it spends its time in."""
    cells = [
        (
            row["layer"],
            str(row["batch"]),
            row["direction"],
            row["competitor"],
            number(row["us"]),
            ", ".join(f"{f['function']} {number(f['us'])} ({number(f['calls'])} x)" for f in row["functions"]),
        )
        for row in rows
    ]
    about = "Until a call returns; nobody waits for the device. Functions' own times, under a profiler that slows them."
    return [about, "", *table(("", "N", "direction", "competitor", f"us, {kind}", "functions, us"), cells, words=None)]


def short(kernel: str) -> str:
    """A kernel's name, a C++ one without arguments and cut."""
    name = kernel.removeprefix("void ").partition("(")[0].partition("<")[0]
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."


def tiles(rows: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """A line for each kernel: the tile that it gets, and the fastest."""
    compared: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        compared.setdefault((row["layer"], str(row["batch"]), row["kernel"]), []).append(row)
    cells = []
    for kernel, own in compared.items():
        timed = [row for row in own if row["us"] is not None]
        chosen = next((row for row in timed if row["chosen"]), None)
        if chosen is None:  # the section ended before
            continue
        best = max(timed, key=lambda row: row["speed"])
        cells.append(
            (
                *kernel,
                *(f for row in (chosen, best) for f in (row["tile"], number(row["us"]))),
                f"{best['speed']:.2f}",
                str(len({row["tile"] for row in own})),
            )
        )
    head = ("", "N", "kernel", "chosen", f"us, {kind}", "fastest", f"us, {kind}", f"x, {kind}", "of")
    return table(head, cells, words=None)


def memory(rows: Sequence[dict[str, Any]], kind: str) -> list[str]:
    lines = []
    if found := of("memory", rows):
        head = (
            "",
            "N",
            "competitor",
            f"x (MB), {kind}",
            f"kept for backward (MB), {kind}",
            f"peak of a step (MB), {kind}",
        )
        cells = [
            (r["layer"], str(r["batch"]), r["competitor"], *(number(r[n]) for n in ("x_mb", "kept_mb", "peak_mb")))
            for r in found
        ]
        lines += ["", "## Memory", "", "Weights are counted too; peaks are above what was allocated before.", ""]
        lines += table(head, cells, words=3)
    if found := of("network memory", rows):
        cells = [(row["network"], str(row["batch"]), number(row["peak_gb"])) for row in found]
        lines += ["", *table(("ResNet-50", "N", f"peak of a step (GB), {kind}"), cells, words=1)]
    return lines


def tuned(rows: Sequence[dict[str, Any]], kind: str) -> list[str]:
    head = ("kernel", "key", "chosen", "of", f"ms, {kind}", "tuning (s)")
    cells = [
        (row["kernel"], row["key"], row["chosen"], str(row["of"]), number(row["ms"]), f"{row['seconds']:.1f}")
        for row in rows
    ]
    total = sum(row["seconds"] for row in rows)
    return [f"{len(rows)} choices in {total:.0f} s, compiling included.", "", *table(head, cells, words=3)]


def of(name: str, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["row"] == name]


def spread(row: dict[str, Any] | None) -> str:
    """Median and 20 and 80 % of a ratio."""
    return "" if row is None else "{1:.2f} ({0:.2f} to {2:.2f})".format(*row["speed"])


def number(value: float | None) -> str:
    """Three significant digits; nothing where there is no number."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def code(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()]
