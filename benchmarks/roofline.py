"""Floor times of every convolution of the paper's networks, as tables and as a picture: a model, not a measurement.

    python -m benchmarks.roofline                                       # all of it; writes benchmarks/results
    python -m benchmarks.roofline --networks resnet50 --batches 128     # prints what is asked for, writes nothing

:mod:`benchmarks.floors` is the model, and :mod:`benchmarks.traffic` counts the bytes and products for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cases import RESNET50, TRANSITIONS

from benchmarks import markdown
from benchmarks.files import write
from benchmarks.floors import DEVICES, PATHS, Device, chosen, floor_seconds, useful_flops
from benchmarks.networks import IMAGES, Convolution, convolutions
from benchmarks.roofline_picture import draw
from spconv_triton.training.cli import count

__all__ = ["floor_seconds", "main", "report"]

BATCHES = (1, 32, 128)

GAP = 1e-6
"""Seconds from the end of a launch to the start of the next: assumed, and only where a column says so."""

RESULTS = Path(__file__).parent / "results"

KINDS = (("A100",), ("H100", "H200"))
"""Devices that get the same launches: flat kernels, and descriptor kernels for the layers that they take."""

PREAMBLE = """\
# Roofline: floor times of every convolution

**A model, not a measurement.** No GPU has run for these numbers. `python -m benchmarks.roofline` writes this file;
what is counted and what is assumed is said in `benchmarks/traffic.py` and `benchmarks/floors.py`. In short:

- Bytes and products are counted from each launch's arguments, blocks and grid. In Triton's interpreter the same
  kernels load, store and multiply exactly as much (`tests/kernels/test_traffic.py`).
- A launch takes its products at the data sheet's peak, or its bytes from memory at the data sheet's bandwidth,
  whichever is longer. Launches follow each other without a gap. What passes between L2 cache and processors is listed,
  but takes no time.
- `nn.Conv2d` is a perfect kernel: every tensor moves once, and it multiplies what its equation has, padding included,
  without the edges of tiles. So the comparison favours it, as it does the 1 x 1 convolution of *separate*.
- Every launch reads from memory. *With L2*: what an earlier launch of the layer touched is read for nothing, where all
  that the layer touches fits into the L2 cache. Before the layer begins, the cache holds nothing of it.
- Of the configurations that the tuner may choose among, the one with the least modelled time.
- float16, alpha = 1/2, two groups, no bias, no branch norms (for inference they fold into the weights).
"""

LEGEND = """\
Cells are *conv2d / separate / one pass*, or the latter two. *Useful* GFLOP are those of the equations (conv2d /
SPConv), two for a multiply-add, padding included; *executed* ones those of whole tiles, with their edges, the zeros
between merged groups, the statistics and the gate. *MB* move to and from memory; *L2 MB* is what the programs ask for,
ATen's taken to ask for everything once.
A convolution that SPConv does not replace is `nn.Conv2d` in all three, and in the totals counts in each.
"""


class Row(NamedTuple):
    """One convolution at one batch size on the devices of one kind, by path; ``count`` alike in a network.

    Attributes:
        useful, executed: floating-point operations.
        moved, requested: bytes.
        seconds, cached: by device, without and with the L2 cache between launches.
    """

    name: str
    count: int
    replaced: bool
    useful: dict[str, float]
    executed: dict[str, float]
    moved: dict[str, float]
    requested: dict[str, float]
    launches: dict[str, float]
    seconds: dict[tuple[str, str], float]
    cached: dict[tuple[str, str], float]


def row(convolution: Convolution, batch: int, devices: Sequence[str], direction: str = "forward") -> Row:
    """The counts are those of the first device."""
    case, count, replaced = convolution
    case = replace(case, batch=batch)
    real = {path: path if replaced else "conv2d" for path in PATHS}
    runs = {path: [traffic for _, traffic in chosen(case, real[path], direction, devices[0])] for path in PATHS}
    return Row(
        case.name,
        count,
        replaced,
        {path: useful_flops(case, real[path], direction) for path in PATHS},
        {path: sum(sum(t.flops.values()) for t in run) for path, run in runs.items()},
        {path: sum(t.touched for t in run) for path, run in runs.items()},
        {path: sum(t.requested for t in run) for path, run in runs.items()},
        {path: len(run) for path, run in runs.items()},
        *(
            {(d, p): floor_seconds(case, real[p], direction, d, cached=cached) for d in devices for p in PATHS}
            for cached in (False, True)
        ),
    )


def total(rows: Iterable[Row]) -> Row:
    """Of a network: every convolution as often as it occurs."""
    rows = list(rows)

    def added(pick: Callable[[Row], dict]) -> dict:
        return {key: sum(r.count * pick(r)[key] for r in rows) for key in pick(rows[0])}

    fields = ("useful", "executed", "moved", "requested", "launches", "seconds", "cached")
    sums = (added(lambda r, f=f: getattr(r, f)) for f in fields)
    return Row("**all**", sum(r.count for r in rows), True, *sums)


def number(value: float) -> str:
    """Three significant digits, and never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-3 else f"{value:.1g}"


def table(rows: Sequence[Row], devices: Sequence[str]) -> list[str]:
    """Markdown."""
    head = ["convolution", "x", "useful GFLOP", "executed GFLOP", "MB", "L2 MB"]
    for device in devices:
        head += [f"{device} us", "with L2", "conv2d / one pass", "with L2"]
    lines = []
    for r in rows:
        every, ours, useful = PATHS, PATHS[1:], (PATHS[0], PATHS[-1])
        if not r.replaced:
            every = ours = useful = PATHS[:1]
        cells = [r.name, str(r.count), *(_cell(r.useful, useful, 1e-9), _cell(r.executed, ours, 1e-9))]
        cells += [_cell(r.moved, every, 1e-6), _cell(r.requested, ours, 1e-6) if r.replaced else ""]
        for device in devices:
            cells.append(_cell(r.seconds, [(device, path) for path in every], 1e6))
            cells.append(_cell(r.cached, [(device, path) for path in ours], 1e6) if r.replaced else "")
            cells += [_gain(times, device) if r.replaced else "" for times in (r.seconds, r.cached)]
        lines.append(cells)
    return markdown.table(head, lines)


def _cell(values: dict, keys: Iterable, scale: float) -> str:
    return " / ".join(number(values[key] * scale) for key in keys)


def _gain(times: dict[tuple[str, str], float], device: str) -> str:
    return f"{times[device, 'conv2d'] / times[device, 'onepass']:.2f}"


def report(networks: Sequence[str], batches: Sequence[int]) -> str:
    """The whole document, for these networks and batch sizes."""
    rows = {
        (network, batch, kind): [row(one, batch, kind) for one in convolutions(network)]
        for network in networks
        for batch in batches
        for kind in KINDS
    }
    lines = [PREAMBLE, *_devices(), "", "## Networks", "", *_summary(rows), "", LEGEND]
    for (network, batch, kind), found in rows.items():
        if kind == KINDS[0]:
            lines += [f"## {network}, {IMAGES[network]} x {IMAGES[network]}, batch {batch}", ""]
        lines += [*table([*found, total(found)], kind), ""]
    lines += ["## Backward", "", BACKWARD]
    for batch in batches:
        for kind in KINDS:
            found = [row(Convolution(case, 1, True), batch, kind, "backward") for case in (*RESNET50, *TRANSITIONS)]
            lines += [f"Batch {batch}:", "", *table(found, kind), ""]
    return "\n".join(lines)


BACKWARD = """\
Gradients of the input and of all weights, of ResNet-50's 3 x 3 convolutions, without a forward.
"""


def _devices() -> list[str]:
    head = ["", "half precision TFLOP/s", "TF32", "float32", "TB/s", "L2 MiB"]
    return markdown.table(
        head,
        [
            [name, *(number(gpu.flops[p] / 1e12) for p in ("half", "tf32", "ieee")), *_memory(gpu)]
            for name, gpu in DEVICES.items()
        ],
    )


def _memory(gpu: Device) -> list[str]:
    return [f"{gpu.bandwidth / 1e12:g}", str(gpu.l2_bytes >> 20)]


def _summary(rows: dict[tuple[str, int, tuple[str, ...]], list[Row]]) -> list[str]:
    """All convolutions of a network, and how many of those that SPConv replaces it makes slower."""
    head = ["network", "batch", "device", "us", "with L2", "conv2d / one pass", "with L2", "launches"]
    head += [f"with {GAP * 1e6:g} us (assumed) behind each", "of replaced, slower", "with L2"]
    lines = []
    for (network, batch, kind), found in rows.items():
        sums = total(found)
        for device in kind:
            gaps = {path: sums.seconds[device, path] + GAP * sums.launches[path] for path in PATHS}
            cells = [network, str(batch), device]
            cells += [_cell(times, [(device, path) for path in PATHS], 1e6) for times in (sums.seconds, sums.cached)]
            cells += [_gain(times, device) for times in (sums.seconds, sums.cached)]
            cells += [_cell(sums.launches, PATHS, 1), f"{gaps['conv2d'] / gaps['onepass']:.2f}"]
            cells += [_slower(found, "seconds", device), _slower(found, "cached", device)]
            lines.append(cells)
    return markdown.table(head, lines, words=3)


def _slower(rows: Sequence[Row], times: str, device: str) -> str:
    replaced = [r for r in rows if r.replaced]
    slower = sum(
        r.count for r in replaced if getattr(r, times)[device, "onepass"] > getattr(r, times)[device, "conv2d"]
    )
    return f"{slower} of {sum(r.count for r in replaced)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=IMAGES, default=list(IMAGES))
    parser.add_argument("--batches", nargs="+", type=count, default=list(BATCHES), metavar="N")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        help="folder; nothing is written of a part",
    )
    options = parser.parse_args(argv)
    text = report(options.networks, options.batches)
    print(text)
    if (options.networks, options.batches) == (list(IMAGES), list(BATCHES)):
        write(options.out / "roofline.md", text)
        draw(options.out / "roofline.svg")


if __name__ == "__main__":
    main()
