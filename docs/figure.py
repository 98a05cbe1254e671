"""The picture of the operator, docs/operator.svg: ``python -m docs.figure``."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PICTURE = Path(__file__).with_name("operator.svg")

PAPER = "#f7f7f4"
"""A background of its own, so that the picture reads the same on a dark page."""

INK, REPRESENTATIVE, REDUNDANT, GATE, PLAIN = "#222222", "#bcd7f0", "#f3d3b0", "#d3e6c4", "#ffffff"

Point = tuple[float, float]


def draw(file: Path) -> None:
    """Write an SVG, the same bytes every time with one version of matplotlib: the equations above, one pass below."""
    options = {"svg.hashsalt": "operator", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    with mpl.rc_context(options):
        figure = Figure(figsize=(10.5, 8.2), facecolor=PAPER, layout="constrained")
        upper, lower = figure.subplots(2, 1, height_ratios=(4.6, 3.0))
        _equations(_empty(upper, 4.6, "The equations: the gate waits for both branches"))
        _one_pass(_empty(lower, 3.0, "One pass: the gate is known before the convolution"))
        figure.savefig(file, format="svg", metadata={"Date": None})


def _empty(axes: Axes, height: float, title: str) -> Axes:
    axes.set(xlim=(0, 10.5), ylim=(0, height))
    axes.set_axis_off()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    return axes


def _box(axes: Axes, centre: Point, size: Point, text: str, colour: str) -> None:
    (x, y), (width, height) = centre, size
    corner = x - width / 2, y - height / 2
    axes.add_patch(
        FancyBboxPatch(corner, width, height, "round,pad=0,rounding_size=0.06", fc=colour, ec=INK, linewidth=1)
    )
    axes.text(x, y, text, ha="center", va="center", color=INK, linespacing=1.35)


def _arrow(axes: Axes, start: Point, end: Point, *, bend: str | None = None, dashed: bool = False) -> None:
    """From start to end, straight, or with one right angle: ``"across"`` first or ``"along"`` first."""
    style = {None: "arc3", "across": "angle,angleA=90,angleB=0,rad=6", "along": "angle,angleA=0,angleB=90,rad=6"}[bend]
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=11,
            shrinkA=0,
            shrinkB=0,
            color=INK,
            linewidth=1,
            linestyle="--" if dashed else "-",
            connectionstyle=style,
        )
    )


def _equations(axes: Axes) -> None:
    _box(axes, (1.0, 3.1), (1.75, 1.5), "x3\nrepresentative\n[N, alpha L, H, W]", REPRESENTATIVE)
    _box(axes, (1.0, 1.35), (1.75, 1.5), "x1\nredundant\n[N, L - alpha L, H, W]", REDUNDANT)
    axes.text(1.0, 4.1, "x, split by channels", ha="center", color=INK)

    _box(axes, (3.2, 3.55), (1.6, 0.6), "GWC  k x k, G groups", REPRESENTATIVE)
    _box(axes, (3.2, 2.65), (1.6, 0.6), "PWC  1 x 1", REPRESENTATIVE)
    _box(axes, (3.2, 1.35), (1.6, 0.6), "PWC'  1 x 1", REDUNDANT)
    _arrow(axes, (1.875, 3.55), (2.4, 3.55))
    _arrow(axes, (1.875, 2.65), (2.4, 2.65))
    _arrow(axes, (1.875, 1.35), (2.4, 1.35))

    _box(axes, (4.55, 3.1), (0.4, 0.4), "+", PLAIN)
    _arrow(axes, (4.0, 3.55), (4.55, 3.3), bend="along")
    _arrow(axes, (4.0, 2.65), (4.55, 2.9), bend="along")
    _box(axes, (5.4, 3.1), (0.8, 0.6), "U3", REPRESENTATIVE)
    _box(axes, (5.4, 1.35), (0.8, 0.6), "U1", REDUNDANT)
    _arrow(axes, (4.75, 3.1), (5.0, 3.1))
    _arrow(axes, (4.0, 1.35), (5.0, 1.35))

    _box(axes, (7.1, 2.225), (1.8, 0.9), "GAP, then softmax\nover the pair:\nbeta, gamma", GATE)
    _arrow(axes, (5.4, 2.8), (6.2, 2.45), bend="across")
    _arrow(axes, (5.4, 1.65), (6.2, 2.0), bend="across")

    _box(axes, (8.75, 3.1), (0.8, 0.4), "beta x", GATE)
    _box(axes, (8.75, 1.35), (0.8, 0.4), "gamma x", GATE)
    _arrow(axes, (5.8, 3.1), (8.35, 3.1))
    _arrow(axes, (5.8, 1.35), (8.35, 1.35))
    _arrow(axes, (8.0, 2.35), (8.75, 2.9), bend="along", dashed=True)
    _arrow(axes, (8.0, 2.1), (8.75, 1.55), bend="along", dashed=True)

    _box(axes, (9.7, 2.225), (0.4, 0.4), "+", PLAIN)
    _arrow(axes, (9.15, 3.1), (9.7, 2.425), bend="along")
    _arrow(axes, (9.15, 1.35), (9.7, 2.025), bend="along")
    _arrow(axes, (9.9, 2.225), (10.15, 2.225))
    axes.text(10.28, 2.225, "Y", ha="center", va="center", color=INK, fontsize=12)
    axes.text(
        0.2,
        0.25,
        "About 15 small kernels; U3, U1 and both products are written, read again and kept for the backward.",
        color=INK,
    )


def _one_pass(axes: Axes) -> None:
    _box(axes, (1.0, 1.6), (1.75, 2.0), "x\n[N, L, H, W]", PLAIN)
    _box(axes, (3.55, 2.2), (2.1, 0.9), "statistics\ntotals and border sums\nof every channel", GATE)
    _box(axes, (6.5, 2.2), (2.6, 0.9), "gate\nS3 and S1 from sums and\nweights, then beta, gamma", GATE)
    _box(axes, (6.5, 0.95), (2.6, 0.8), "convolution\nY is written once", REPRESENTATIVE)
    _arrow(axes, (1.875, 2.2), (2.5, 2.2))
    _arrow(axes, (4.6, 2.2), (5.2, 2.2))
    _arrow(axes, (6.5, 1.75), (6.5, 1.35), dashed=True)
    axes.text(6.62, 1.55, "scale and ratio, [N, M] each", va="center", color=INK)
    _arrow(axes, (1.875, 0.95), (5.2, 0.95))
    _arrow(axes, (7.8, 0.95), (10.15, 0.95))
    axes.text(10.28, 0.95, "Y", ha="center", va="center", color=INK, fontsize=12)
    axes.text(
        0.2,
        0.15,
        "Three kernels. Means and convolutions are linear: the means of U3 and U1 follow from sums of x.",
        color=INK,
    )


if __name__ == "__main__":
    draw(PICTURE)
