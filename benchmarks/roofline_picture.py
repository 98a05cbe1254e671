"""The roofline of each GPU with ResNet-50's layers on it: a model, not a measurement."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
from cases import Case
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.files import write
from benchmarks.floors import DEVICES, PATHS, Device, chosen, floor_seconds, useful_flops
from benchmarks.networks import convolutions

NETWORK = "resnet50"
BATCHES = (128, 1)

STYLE = {"conv2d": ("o", "#333333"), "separate": ("s", "#c1272d"), "onepass": ("^", "#0057a8")}
"""Told apart by shape as well as by colour."""

NAMES = {"conv2d": "nn.Conv2d", "separate": "SPConv, separate kernels", "onepass": "SPConv, one pass"}

PAPER = "#f4f4f1"
"""A background of its own, so that the picture reads the same on a dark page."""

OTHER = {"marker": ".", "color": "#9a9a94", "markersize": 5, "linestyle": ""}

LIMITS = (5.0, 4000.0)
"""Of the horizontal axis."""

TITLE = (
    "ResNet-50's convolutions, float16, forward: a model, not a measurement\n"
    "numbers: modelled time of nn.Conv2d / of one pass, by channels@size; below 1, one pass is slower"
)


def draw(file: Path) -> None:
    """Writes an SVG, the same bytes every time: a row for each batch size, a column for each GPU."""
    options = {"svg.hashsalt": "roofline", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    with mpl.rc_context(options):
        figure = Figure(figsize=(15, 10), facecolor=PAPER, layout="constrained")
        for axes, batch in zip(
            figure.subplots(len(BATCHES), len(DEVICES), sharex=True, sharey=True), BATCHES, strict=True
        ):
            for panel, (name, device) in zip(axes, DEVICES.items(), strict=True):
                _roof(panel, device)
                _layers(panel, name, batch)
                panel.set_title(f"{name}, batch {batch}")
        for panel in figure.axes[-len(DEVICES) :]:
            panel.set_xlabel("useful FLOP / byte moved to and from memory")
        for panel in figure.axes[:: len(DEVICES)]:
            panel.set_ylabel("useful TFLOP/s")
        figure.suptitle(TITLE, fontsize=13)
        figure.legend(handles=_legend(), loc="outside lower center", ncols=5, frameon=False)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    write(file, drawing.getvalue())


def _roof(panel: Axes, device: Device) -> None:
    peak, bandwidth = device.flops["half"] / 1e12, device.bandwidth / 1e12
    left, right = LIMITS
    panel.plot([left, peak / bandwidth, right], [left * bandwidth, peak, peak], color="#555555", linewidth=1.5)
    panel.text(right * 0.9, peak * 1.05, f"{peak:.0f} TFLOP/s", ha="right", va="bottom", color="#333333")
    panel.text(left * 2.2, left * 2 * bandwidth, f"{bandwidth:g} TB/s", ha="left", va="top", color="#333333")
    panel.set(xscale="log", yscale="log", xlim=LIMITS, ylim=(10, 2000), facecolor=PAPER)
    panel.grid(which="major", color="#d5d5d0", linewidth=0.6)
    panel.set_axisbelow(True)


def _layers(panel: Axes, device: str, batch: int) -> None:
    """Markers, hollow at stride 2, and a label in the corner for each of one pass, in the order of their heights."""
    labels = []
    for case, _, replaced in convolutions(NETWORK):
        layer = replace(case, batch=batch)
        if not replaced:
            panel.plot(*_place(layer, "conv2d", device), **OTHER)
            continue
        places = {path: _place(layer, path, device) for path in PATHS}
        strided = case.stride != (1, 1)
        for path, place in places.items():
            marker, colour = STYLE[path]
            panel.plot(*place, marker, color=colour, markersize=7, markerfacecolor="none" if strided else colour)
        seconds = [floor_seconds(layer, path, "forward", device) for path in ("conv2d", "onepass")]
        name = f"{case.in_channels}@{case.size[0]}{' / 2' if strided else ''}: {seconds[0] / seconds[1]:.2f}"
        labels.append((places["onepass"], name))
    labels.sort(key=lambda label: label[0][1])
    for row, (place, name) in enumerate(labels):
        panel.annotate(
            name,
            place,
            xytext=(0.97, 0.03 + 0.06 * row),
            textcoords="axes fraction",
            ha="right",
            va="center",
            fontsize=9,
            color=STYLE["onepass"][1],
            arrowprops={
                "arrowstyle": "-",
                "color": "#8fa9c4",
                "linewidth": 0.7,
                "shrinkA": 2,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


def _place(case: Case, path: str, device: str) -> tuple[float, float]:
    """Useful operations by byte, and by second."""
    run = chosen(case, path, "forward", device)
    flops = useful_flops(case, path, "forward")
    return flops / sum(t.touched for _, t in run), flops / sum(seconds for seconds, _ in run) / 1e12


def _legend() -> list[Line2D]:
    marks = [Line2D([], [], marker=m, color=c, linestyle="", label=NAMES[path]) for path, (m, c) in STYLE.items()]
    hollow = Line2D([], [], marker="o", color="#333333", markerfacecolor="none", linestyle="", label="hollow: stride 2")
    return [*marks, hollow, Line2D([], [], label="1 x 1 and 7 x 7, not replaced", **OTHER)]
