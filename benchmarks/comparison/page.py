"""REPORT.md and its pictures, from what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparison import pictures, tables
from benchmarks.comparison.in_short import in_short
from benchmarks.competitors import DIRECTIONS
from benchmarks.files import write
from benchmarks.peers import NETWORKS

Results = dict[str, Any]

PICTURES = "results"
"""The pictures' folder, beside the page."""

LAYERS = """\
Speeds against the faster layout of `nn.Conv2d` in eager mode, also of what is compiled: compiled `nn.Conv2d` has a line
or a column of its own beside it. More is better. Geometric means of ResNet-50's 3 x 3 convolutions without a stride,
float32:"""

NETWORKS_SWAPPED = """\
The 3 x 3 convolutions behind the first are swapped; for OctConv all behind the first. float32; speeds against
`nn.Conv2d` in eager mode, also of what is compiled. SPConv has its branch norms, as the paper's networks do.
*Deployed* is `spconv_triton.fuse(plain_norms=True)`, of every network but OctConv's: norms fold where they stand behind
a convolution, and stay behind a sum, a shuffle or a concatenation."""

METHOD = """\
- **Peers** are in `benchmarks/peers`, each from its paper's equations and compared in float64 with another formulation
  of them (`tests/test_peers.py`). Networks made of them have the published sizes; where not, by how much is in
  `tests/test_peer_sizes.py`. OctConv takes and gives maps in two resolutions, the most favourable way to time it.
  *Compiled* is `torch.compile`, anew for each shape, of layers with `fullgraph=True`; *U3 - U1 kept* is under
  `spconv_triton.set_recompute(False)`.
- **Each at its best**: contiguous or channels_last, whichever is faster for it. Inference is in eval mode and without
  gradients.
- **Nothing is timed whose result is wrong**: outputs and all gradients of the very call that is timed are compared with
  float64 before, for the first two images. Of networks the logits of two images in inference are compared with those
  of an eager copy in float64, not a training step. Latencies beside accuracies are in channels_last, and not checked.
- **In turns**: each round times every competitor, in an order of its own, and a speed is nn.Conv2d's time
  over the competitor's *in the same round*. A cell is the median of the rounds, with their 20 % and 80 % quantiles.
  {rounds}
- **Free memory stays with the process** (`benchmarks/allocator.py`), of maps of any size: else everyone is timed by the
  page faults of each map of more than 32 MiB that it makes, and whoever makes none but its output has the fewest.
- **Memory**: *kept* is what autograd holds for the backward, input and weights included, each storage once; *peak* is
  the most that PyTorch's allocator had given out during the call. On a CPU, oneDNN's scratch memory is not seen.
- **MACs** are multiply-accumulates of the equations; norms, activations and the gate are not counted."""

CIFAR = """\
The digits are small and easy: they show that nothing is broken and where a cheap layer costs accuracy, not what the
paper's table says. On a machine that has CIFAR-10 (the binary version), this trains the rows of that table and prints
them beside the published ones; it goes on where it was interrupted:

    .venv/bin/python -m benchmarks.cifar10 DIR --out runs/cifar10"""


def write_page(results: Results, folder: Path) -> Path:
    """Write ``folder / REPORT.md`` and its pictures; sections without results are left out.

    Returns:
        The page.
    """
    lines = [*_layers(results, folder), *_networks(results), *_accuracy(results, folder)]
    short = in_short("\n".join(lines))
    lines = [*_head(results), *(["", "## In short", "", *short] if short else []), *lines]
    wrong = tables.errors([*results.get("layers", ()), *results.get("networks", ())])
    if wrong:
        lines += ["", "## Not timed", "", *wrong]
    lines += ["", "## How it is measured", "", METHOD.format(rounds=_rounds(results)), ""]
    page = folder / "REPORT.md"
    write(page, "\n".join(lines))
    return page


def _rounds(results: Results) -> str:
    """How many there are, which the time that is given to a comparison decides."""
    said = []
    for section, what in (("layers", "layer"), ("networks", "network"), ("accuracy", "latency beside an accuracy")):
        counts = [value for row in results.get(section, ()) for key, value in row.items() if key.endswith("rounds")]
        if counts:
            low, high = min(counts), max(counts)
            said.append(f"{low if low == high else f'{low} to {high}'} for a {what}")
    return f"Rounds: {', '.join(said)}." if said else "How many rounds there were is not recorded."


def _head(results: Results) -> list[str]:
    plan = results["plan"]
    return [
        "# SPConv and what one would use instead",
        "",
        f"Written by `{results['command']}` ({plan} mode, {results['minutes']:.0f} min) on {results['date']}.",
        "",
        f"{results['machine']}.",
        "",
        "The other mode, the machine's own figures, and a comparison of two revisions:",
        "",
        "    make bench                       # quick, under 5 minutes",
        "    make bench FULL=1                # full, 20 to 40 minutes",
        "    make bench-compare BASE=REV      # is the working tree slower than REV?",
    ]


def _layers(results: Results, folder: Path) -> list[str]:
    rows = results.get("layers")
    if not rows:
        return []
    lines = ["", "## Layers", "", LAYERS, "", *tables.means(rows)]
    for direction in DIRECTIONS:
        batch = max((r["batch"] for r in rows if tables.stage(r) and r["batch"] <= 8), default=0)
        name = f"layers-{direction.replace('+', '-')}.svg"
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in tables.of_stages(rows, batch, direction):
            groups.setdefault(row["stage"], []).append(row)
        if groups:
            title = f"ResNet-50's 3 x 3 convolutions, N = {batch}, float32, {direction}"
            pictures.draw_bars(folder / PICTURES / name, list(groups.items()), title)
            lines += ["", f"![Bars: {title}]({PICTURES}/{name})"]
    for network in NETWORKS:
        for dtype in dict.fromkeys(r["dtype"] for r in rows):
            for direction in DIRECTIONS:
                found = tables.layers(rows, network, dtype, direction)
                if len(found) > 2:
                    lines += ["", f"### {network}, {dtype}, {direction}", "", *found]
    lines += ["", "### Faster than SPConv with as many multiply-accumulates or more", ""]
    lines += tables.beaten(rows) or ["Nobody, in any layer."]
    batches = sorted({r["batch"] for r in rows if tables.stage(r) and "kept_bytes" in r})
    if batches:
        batch = 8 if 8 in batches else batches[-1]
        lines += ["", f"### Memory: ResNet-50, float32, forward+backward, N = {batch}", "", *tables.memory(rows, batch)]
    return lines


def _networks(results: Results) -> list[str]:
    rows: Sequence[dict[str, Any]] = results.get("networks", ())
    lines: list[str] = []
    for network in dict.fromkeys(r["network"] for r in rows):
        lines += ["", f"### {network}", "", *tables.networks(rows, results["sizes"], network)]
    if not lines:
        return []
    return ["", "## Networks", "", NETWORKS_SWAPPED, *lines]


def _accuracy(results: Results, folder: Path) -> list[str]:
    rows = results.get("accuracy")
    if not rows:
        return []
    seeds, epochs = len(rows[0]["accuracies"]), rows[0]["epochs"]
    budget = f"{epochs} epoch{'s'[: epochs > 1]}, {seeds} seed{'s'[: seeds > 1]}"
    title = f"ResNet-20 on handwritten digits, {budget}: mean and standard deviation"
    pictures.draw_pareto(folder / PICTURES / "pareto.svg", rows, title)
    return [
        "",
        "## Accuracy at equal budget",
        "",
        f"ResNet-20 on scikit-learn's digits, the same data, recipe and {budget} for each: mean and standard deviation",
        "over the seeds, times on one thread.",
        "",
        *tables.accuracy(rows),
        "",
        f"![Accuracy against parameters, MACs and latency]({PICTURES}/pareto.svg)",
        "",
        CIFAR,
    ]
