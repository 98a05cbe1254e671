"""Rows of measurements as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.comparison.accuracy import CANDIDATES
from benchmarks.comparison.layers import STAGES
from benchmarks.comparison.networks import DEPLOYED_TITLES
from benchmarks.markdown import table
from benchmarks.peers import NAMES, TITLES

Row = dict[str, Any]

NONE = ""

ALL_TITLES = {**TITLES, **DEPLOYED_TITLES}

OURS = ("spconv", "spconv kept", "spconv compiled")


def spread(values: Sequence[float] | None) -> str:
    """Median, and 20 to 80 %."""
    if values is None:
        return NONE
    return f"{values[1]:.2f} ({values[0]:.2f} to {values[2]:.2f})"


def stage(row: Row) -> str | None:
    """Which of ResNet-50's four stages a row is about; None for any other layer."""
    if row["network"] != "resnet50":
        return None
    found = next((s for s in STAGES if row["layer"].startswith(f"3 x 3, {s} x")), None)
    return None if found is None else f"{found.split()[0]}@{found.split()[-1]}"


def of_stages(rows: Sequence[Row], batch: int, direction: str, dtype: str = "float32") -> list[Row]:
    return [
        {**row, "stage": stage(row)}
        for row in rows
        if stage(row) and (row["batch"], row["direction"], row["dtype"]) == (batch, direction, dtype)
    ]


def means(rows: Sequence[Row]) -> list[str]:
    """Geometric means over ResNet-50's four stages of each competitor's speed, forward and with backward, by batch."""
    columns = sorted({(r["direction"], r["batch"]) for r in rows if stage(r) and r["dtype"] == "float32"})
    body = []
    for name in NAMES:
        speeds = []
        for direction, batch in columns:
            found = [r for r in of_stages(rows, batch, direction) if r["name"] == name and "speed" in r]
            complete = len(found) == len(STAGES)
            speeds.append(f"{statistics.geometric_mean(r['speed'][1] for r in found):.2f}" if complete else NONE)
        if any(speeds):
            body.append((TITLES[name], _fewer_macs(rows, name), *speeds))
    head = ("", "MACs, nn.Conv2d / own", *(f"{direction}, N = {batch}" for direction, batch in columns))
    return table(head, body)


def _fewer_macs(rows: Sequence[Row], name: str) -> str:
    """How many times fewer than nn.Conv2d's, over the stages on which ``name`` ran."""
    macs = {n: {_key(r): r["macs"] for r in rows if r["name"] == n and stage(r)} for n in (name, "conv2d")}
    own = macs[name]
    return f"{sum(macs['conv2d'][key] for key in own) / sum(own.values()):.2f}" if own else NONE


def _key(row: Row) -> tuple[str, ...]:
    """What identifies a comparison."""
    return row["network"], row["layer"], f"N = {row['batch']}", row["dtype"], row["direction"]


def layers(rows: Sequence[Row], network: str, dtype: str, direction: str) -> list[str]:
    """A line for each layer and batch: milliseconds of nn.Conv2d, and speeds against it."""
    chosen = [r for r in rows if (r["network"], r["dtype"], r["direction"]) == (network, dtype, direction)]
    names = [name for name in NAMES[1:] if any(r["name"] == name for r in chosen)]
    cells: dict[tuple[str, int], dict[str, Row]] = {}
    for row in chosen:
        cells.setdefault((row["layer"], row["batch"]), {})[row["name"]] = row
    body = []
    for (layer, batch), found in cells.items():
        dense = found["conv2d"].get("seconds")
        first = NONE if dense is None else f"{1e3 * dense[1]:.3g}"
        body.append((layer, str(batch), first, *(spread(found.get(name, {}).get("speed")) for name in names)))
    return table(("layer", "N", "nn.Conv2d (ms)", *(TITLES[name] for name in names)), body)


def beaten(rows: Sequence[Row]) -> list[str]:
    """A line for each comparison in which somebody who multiplies as much as SPConv, or more, is faster than it.

    Where SPConv ran in several ways, it is the fastest of them that others are compared with.
    """
    cells: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(_key(row), {})[row["name"]] = row
    lines = []
    for key, found in cells.items():
        ours = [found[name] for name in OURS if "speed" in found.get(name, {})]
        if not ours:
            continue
        own = max(ours, key=lambda row: row["speed"][1])
        faster = [
            f"{TITLES[name]} ({row['speed'][1] / own['speed'][1]:.2f} x)"
            for name, row in found.items()
            if name not in OURS and "speed" in row and row["macs"] >= own["macs"] and row["speed"][1] > own["speed"][1]
        ]
        if faster:
            lines.append(f"- {', '.join(key)}: {', '.join(faster)}")
    return lines


def memory(rows: Sequence[Row], batch: int) -> list[str]:
    """Megabytes of ResNet-50's four stages with backward: kept for it, and the peak."""
    chosen = [r for r in of_stages(rows, batch, "forward+backward") if "kept_bytes" in r]
    stages = list(dict.fromkeys(r["stage"] for r in chosen))
    body = []
    for name in NAMES:
        own = {r["stage"]: _kept_and_peak(r) for r in chosen if r["name"] == name}
        if own:
            body.append((TITLES[name], *(own.get(s, NONE) for s in stages)))
    return table(("kept / peak (MB)", *stages), body)


def _kept_and_peak(row: Row) -> str:
    return f"{row['kept_bytes'] / 1e6:.2f} / {row['peak_bytes'] / 1e6:.2f}"


def networks(rows: Sequence[Row], sizes: Sequence[Row], network: str) -> list[str]:
    """A line for each competitor: size, latency, throughput, training step, memory."""
    own = [r for r in rows if r["network"] == network]
    loads = list(dict.fromkeys((r["step"], r["batch"]) for r in own))
    head = ["", "parameters (M)", "MACs (M)"]
    for step, batch in loads:
        kind = "training step" if step else "inference"
        head += [f"{kind}, N = {batch} (ms)", "images/s", "speed", "peak (MB)"]
    known = {r["name"]: r for r in sizes if r["network"] == network}
    body = []
    for name, title in ALL_TITLES.items():
        found = {(r["step"], r["batch"]): r for r in own if r["name"] == name and "seconds" in r}
        if not found:
            continue
        norms = next(iter(found.values()))
        if norms.get("norms_left"):
            title += f" ({norms['norms_left']} of {norms['norms']} norms stay)"
        size = known.get(name) or known[name.partition(" ")[0]]  # deployed or compiled, it is the same network
        cells = [title, f"{size['parameters'] / 1e6:.2f}", f"{size['macs'] / 1e6:.4g}"]
        for load in loads:
            row = found.get(load)
            if row is None:
                cells += [NONE] * 4
                continue
            seconds = row["seconds"][1]
            cells += [f"{1e3 * seconds:.4g}", f"{load[1] / seconds:.4g}", spread(row.get("speed"))]
            cells.append(f"{row['peak_bytes'] / 1e6:.3g}")
        body.append(cells)
    return table(head, body)


def accuracy(rows: Sequence[Row]) -> list[str]:
    head = ("", "test accuracy (%)", "parameters (thousands)", "MACs (millions)", "batch 1 (ms)", "batch 64 (ms)")
    body = [
        (
            CANDIDATES[r["name"]],
            f"{r['mean']:.2f} ± {r['spread']:.2f}" if len(r["accuracies"]) > 1 else f"{r['mean']:.2f}",
            f"{r['parameters'] / 1e3:.1f}",
            f"{r['macs'] / 1e6:.2f}",
            f"{1e3 * r['latency'][1]:.2f}",
            f"{1e3 * r['latency_64'][1]:.1f}",
        )
        for r in sorted(rows, key=lambda r: -r["mean"])
    ]
    return table(head, body)


def errors(rows: Sequence[Row]) -> list[str]:
    """What was not timed because its result was wrong, or it did not run."""
    return [
        f"- {r['network']}, {r.get('layer', '')} {ALL_TITLES.get(r['name'], r['name'])}: {r['error']}"
        for r in rows
        if "error" in r
    ]
