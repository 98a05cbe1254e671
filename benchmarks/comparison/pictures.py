"""The page's pictures: SVG on a background of its own, so that they read the same on a dark page as on a light one."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from benchmarks.comparison.accuracy import CANDIDATES
from benchmarks.files import write
from benchmarks.peers import TITLES

Row = dict[str, Any]

PAPER, GRID, INK = "#f4f4f1", "#d5d5d0", "#333333"

STYLES = {
    "conv2d": ("o", "#333333"),
    "spconv": ("*", "#0057a8"),
    "conv2d compiled": ("o", "#7f7f7f"),
    "spconv compiled": ("*", "#3d85c6"),
    "spconv kept": ("*", "#003a70"),
    "reference": ("P", "#6fa8dc"),
    "reference compiled": ("X", "#9fc5e8"),
    "ghost": ("s", "#7a3b9a"),
    "ghost compiled": ("s", "#b48bc8"),
    "hetconv-p4": ("^", "#c1272d"),
    "hetconv-p8": ("v", "#e06666"),
    "octconv": ("D", "#b8860b"),
    "separable": ("h", "#3a7d44"),
    "shuffle": ("<", "#8a5a2b"),
    "pconv": (">", "#6b6b00"),
    "spconv 1/4": ("*", "#3d85c6"),
    "spconv 1/8": ("*", "#6fa8dc"),
}
"""Told apart by shape as well as by colour."""


def draw_bars(file: Path, groups: Sequence[tuple[str, Sequence[Row]]], title: str) -> None:
    """Speeds against nn.Conv2d, a panel for each group of rows; the line at the end of a bar is 20 to 80 %."""

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        names = [name for name in TITLES if any(row["name"] == name for _, rows in groups for row in rows)][::-1]
        for panel, (label, rows) in zip(panels, groups, strict=True):
            speeds = {row["name"]: row["speed"] for row in rows if "speed" in row}
            for place, name in enumerate(names):
                if name in speeds:
                    _bar(panel, place, speeds[name], STYLES[name][1])
            panel.axvline(1, color=INK, linewidth=1)
            panel.set(title=label, xlabel="speed (nn.Conv2d = 1)", yticks=range(len(names)))
            panel.set_yticklabels([TITLES[name] for name in names])
            panel.set_xlim(0, 1.18 * max([1.0, *(speed[2] for speed in speeds.values())]))
            panel.grid(axis="x", color=GRID, linewidth=0.6)
        figure.suptitle(title)

    _save(file, (3.3 * len(groups) + 2, 4.4), fill)


def draw_pareto(file: Path, rows: Sequence[Row], title: str) -> None:
    """Accuracy against parameters, multiply-accumulates and latency; the line joins what nothing beats in both."""

    def fill(figure: Figure) -> None:
        costs: tuple[tuple[str, Callable[[Row], float]], ...] = (
            ("parameters (thousands)", lambda row: row["parameters"] / 1e3),
            ("multiply-accumulates per image (millions)", lambda row: row["macs"] / 1e6),
            ("latency at batch 1 (ms)", lambda row: 1e3 * row["latency"][1]),
        )
        panels = figure.subplots(1, len(costs), sharey=True)
        for panel, (label, cost) in zip(panels, costs, strict=True):
            for row in rows:
                marker, colour = STYLES[row["name"]]
                size = 13 if marker == "*" else 8
                panel.errorbar(
                    cost(row),
                    row["mean"],
                    row["spread"],
                    fmt=marker,
                    color=colour,
                    markersize=size,
                    elinewidth=0.8,
                    capsize=2,
                    label=CANDIDATES[row["name"]],
                )
            front = pareto([(cost(row), row["mean"]) for row in rows])
            panel.plot(*zip(*front, strict=True), color="#8f8f88", linewidth=1, zorder=0)
            panel.set(xlabel=label, xscale="log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.grid(which="both", color=GRID, linewidth=0.6)
        panels[0].set_ylabel("test accuracy (%)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(title)

    _save(file, (13, 5.6), fill)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of (cost, gain) that no other equals at less cost or beats at the same, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def _bar(panel: Axes, place: int, speed: Sequence[float], colour: str) -> None:
    low, middle, high = speed
    panel.barh(place, middle, color=colour, height=0.7)
    panel.plot([low, high], [place, place], color=INK, linewidth=1.2)
    panel.text(high, place, f" {middle:.2f}", va="center", fontsize=8, color=INK)


def _save(file: Path, size: tuple[float, float], fill: Callable[[Figure], None]) -> None:
    """Draws what ``fill`` puts on a figure; the same rows give the same bytes."""
    options = {
        "svg.hashsalt": "comparison",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.facecolor": PAPER,
        "axes.axisbelow": True,
        "axes.edgecolor": INK,
    }
    with mpl.rc_context(options):
        figure = Figure(figsize=size, facecolor=PAPER, layout="constrained")
        fill(figure)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    write(file, drawing.getvalue())
