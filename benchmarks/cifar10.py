"""``python -m benchmarks.cifar10 DIR``: trains the rows of the paper's CIFAR-10 table, and prints them beside it.

DIR holds the binary version of CIFAR-10. Each finished run is a line of ``runs.jsonl`` in ``--out``; one that is there
is not trained again, so an interrupted table goes on. The recipe is the same for every row: SGD with Nesterov momentum
0.9, 200 epochs, batches of 128, weight decay 5e-4, crops with 4 pixels of padding, mirroring; the learning rate warms
up to 0.1 over a tenth of the training and falls along a cosine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks import markdown
from benchmarks.peers import Ghost, build_network, count_macs, count_parameters
from benchmarks.peers.catalogue import swap
from spconv_triton import models
from spconv_triton.training.cli import count, count_or_zero
from spconv_triton.training.data import (
    WEIGHTS,
    Data,
    evaluation_batches,
    seed_epoch,
    steps_per_epoch,
    training_batches,
)
from spconv_triton.training.datasets import cifar10
from spconv_triton.training.errors import UserError
from spconv_triton.training.files import append_line, make_folder
from spconv_triton.training.learner import Learner, Recipe
from spconv_triton.training.processes import Processes, pick_device

IMAGE = (1, 3, 32, 32)
RUNS = "runs.jsonl"


class Published(NamedTuple):
    """A row of the paper's table.

    Attributes:
        network: of :data:`spconv_triton.models.MODELS`.
        layer: the competitor.
        alpha: of SPConv.
        parameters, macs: in millions, as printed.
        accuracy: in %, as printed.
    """

    network: str
    layer: str
    alpha: float | None
    parameters: str
    macs: str
    accuracy: str

    @property
    def key(self) -> str:
        return f"{self.network} {self.layer}" + (f" alpha {self.alpha:g}" if self.alpha else "")

    def build(self) -> nn.Module:
        if self.layer == "spconv":
            return models.MODELS[self.network](self.alpha)
        if self.layer == "ghost":  # its authors replace the first convolution too
            return swap(models.MODELS[self.network](), lambda *window: Ghost(*window, norm=True), min_channels=1)
        return build_network(self.network, self.layer)


TABLE = (
    Published("vgg16", "conv2d", None, "16.62", "349.51", "94.00"),
    Published("vgg16", "ghost", None, "7.7", "158", "93.70"),
    Published("vgg16", "hetconv-p4", None, "5.17", "105.98", "93.92"),
    Published("vgg16", "hetconv-p8", None, "3.54", "76.89", "93.86"),
    Published("vgg16", "spconv", 1 / 2, "5.6", "118.27", "94.40"),
    Published("vgg16", "spconv", 1 / 4, "3.77", "79.34", "93.94"),
    Published("vgg16", "spconv", 1 / 8, "2.85", "59.87", "93.77"),
    Published("vgg16", "spconv", 1 / 16, "2.39", "55.14", "93.43"),
    Published("resnet20", "conv2d", None, "0.27", "41.62", "92"),
    Published("resnet20", "spconv", 1 / 2, "0.10", "17.91", "92.23"),
    Published("resnet20", "spconv", 1 / 4, "0.071", "12.89", "91.15"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cifar10", description="the paper's CIFAR-10 table")
    parser.add_argument("directory", type=Path, help="of CIFAR-10's binary version")
    parser.add_argument("--networks", nargs="+", choices=("vgg16", "resnet20"), default=["vgg16", "resnet20"])
    parser.add_argument("--layers", nargs="+", choices=sorted({row.layer for row in TABLE}), help="(default: all)")
    parser.add_argument("--epochs", type=count, default=200, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=count, default=128, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=count, default=1, help="runs of each row (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--workers", type=count_or_zero, default=0, help="processes that load images (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"), help="folder of runs.jsonl")
    options = parser.parse_args(arguments)
    try:
        data = cifar10(options.directory)
        make_folder(options.out)
        here = Processes(0, 1, pick_device(options.device))
        done = _read(options.out / RUNS)
        asked = {"epochs": options.epochs, "batch_size": options.batch_size}
        for row in TABLE:
            if row.network not in options.networks or (options.layers and row.layer not in options.layers):
                continue
            for seed in range(options.seeds):
                run = {"row": row.key, "seed": seed, **asked}
                if any(run.items() <= other.items() for other in done):
                    continue
                seed_epoch(seed, WEIGHTS)
                run["accuracy"] = train(
                    row.build(), data, seed, options.epochs, options.batch_size, here, options.workers
                )
                append_line(options.out / RUNS, json.dumps(run))
                done.append(run)
                print(f"{row.key}, seed {seed}: {run['accuracy']:.2f} %", file=sys.stderr, flush=True)
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table([run for run in done if asked.items() <= run.items()])))
    return 0


def train(
    network: nn.Module, data: Data, seed: int, epochs: int, batch_size: int, here: Processes, workers: int = 0
) -> float:
    """Test accuracy in % after the last epoch; the network is trained in place."""
    recipe = Recipe(lr=0.1, weight_decay=5e-4, steps=steps_per_epoch(data, batch_size, 1) * epochs)
    learner = Learner(network, recipe, here)
    for epoch in range(epochs):
        for images, labels in training_batches(data, batch_size, seed, epoch, here, workers):
            learner.step(images, labels)
        learner.finish_epoch()
    return 100 * learner.evaluate(evaluation_batches(data, 256, here, workers)).accuracy


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: ours and the published, for the rows that were run."""
    rows = []
    for row in TABLE:
        found = [run["accuracy"] for run in runs if run["row"] == row.key]
        if not found:
            continue
        with torch.device("meta"):
            network = row.build()
        spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        rows.append(
            (
                row.key,
                f"{count_parameters(network) / 1e6:.3g}, {row.parameters}",
                f"{count_macs(network, IMAGE) / 1e6:.2f}, {row.macs}",
                f"{statistics.fmean(found):.2f}{spread}, {row.accuracy}",
            )
        )
    return markdown.table(("", "parameters (M), printed", "MACs (M), printed", "accuracy (%), printed"), rows)


def _read(path: Path) -> list[dict[str, Any]]:
    """The runs so far.

    Raises:
        UserError: a line that is none, as half of one is.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"a line of {path} is damaged; correct or remove it: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
