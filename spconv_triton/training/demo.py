"""The demo: vanilla and SPConv ResNet-20 side by side on handwritten digits, and what each costs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, models
from . import measure
from .data import WEIGHTS, Data, evaluation_batches, length, seed_epoch, steps_per_epoch, training_batches
from .datasets import load
from .errors import UserError, need
from .files import make_folder, write_whole
from .learner import Learner, Recipe, Score
from .processes import Processes, cpu_threads, pick_device, telling_of_memory

NAMES = ("vanilla", "SPConv")
BATCH = 64


@dataclass(frozen=True)
class Options:
    """What the demo can be told.

    Attributes:
        out: folder of the results.
        epochs: passes over the training images.
        samples: training images; None takes all 1,437.
        size: height and width of the images, pixels.
        alpha: ratio of representative channels.
        branch_norm: a norm in each branch of SPConv, as in the paper's published sizes; without, as in its equations.
        seed: of the weights, the order of the images and their augmentation.
        rounds: turns of each network in a timing.
        threads: of the CPU. A second one makes networks so small 1.3 x faster on an idle machine, and several times
            slower where another program has the core that it waits for.
        device: as of ``--device``.
    """

    out: Path
    epochs: int = 20
    samples: int | None = None
    size: int = 16
    alpha: float = 0.5
    branch_norm: bool = False
    seed: int = 0
    rounds: int = 20
    threads: int = 1
    device: str = "auto"


@dataclass(frozen=True)
class Row:
    """One line of the table: a quantity of both networks, and SPConv / vanilla (for an accuracy: the difference)."""

    quantity: str
    unit: str
    vanilla: float
    spconv: float
    ratio: float

    def texts(self) -> tuple[str, str, str, str]:
        """The line as it is printed."""
        name = f"{self.quantity} ({self.unit})" if self.unit else self.quantity
        if self.unit == "%":
            return name, f"{self.vanilla:.2f}", f"{self.spconv:.2f}", f"{self.ratio:+.2f} points"
        digits = 0 if self.vanilla >= 1000 else 2
        return name, f"{self.vanilla:,.{digits}f}", f"{self.spconv:,.{digits}f}", f"{self.ratio:.2f} x"


@dataclass(frozen=True)
class Curve:
    """Scores by epoch of one network."""

    train: list[Score]
    test: list[Score]


def run(options: Options) -> None:
    """The demo on ``options.threads`` threads; see :func:`show`."""
    advice = "a smaller --image-size, or fewer --samples"
    with telling_of_memory(advice, "a smaller --image-size"), cpu_threads(options.threads):
        show(options)


def show(options: Options) -> None:
    """Train both networks, print the table, write ``results.json``, ``results.md`` and ``curves.png``.

    Raises:
        UserError: a dependency or device that is missing, or a folder that cannot be written.
    """
    console_module, progress_module = need("rich.console", "the demo"), need("rich.progress", "the demo")
    need("matplotlib", "the demo")
    device = pick_device(options.device)
    if options.samples is not None and options.samples < BATCH:
        raise UserError(f"--samples must be at least {BATCH}, got {options.samples}")
    data = load("digits", options.size, options.samples)
    make_folder(options.out)
    here = Processes(0, 1, device)
    steps = steps_per_epoch(data, BATCH, 1) * options.epochs
    recipe = Recipe(lr=0.1, weight_decay=5e-4, steps=steps)
    learners = []
    for alpha in (None, options.alpha):
        seed_epoch(options.seed, WEIGHTS)
        learners.append(
            Learner(models.resnet20(alpha, in_channels=data.channels, branch_norm=options.branch_norm), recipe, here)
        )

    columns = (
        progress_module.TextColumn("{task.description}"),
        progress_module.BarColumn(),
        progress_module.TaskProgressColumn(),
        progress_module.TimeElapsedColumn(),
        progress_module.TimeRemainingColumn(),
    )
    with progress_module.Progress(*columns, console=console_module.Console(stderr=True)) as progress:
        task = progress.add_task("training", total=steps)
        curves = train(learners, data, options, lambda text: progress.update(task, advance=1, description=text))
        task = progress.add_task("measuring", total=None)
        rows = compare(learners, data, curves, options.rounds)
        progress.update(task, total=1, completed=1)

    facts = describe(learners, data, options)
    console_module.Console().print(_table(rows, facts))
    report = {**facts, "rows": [asdict(row) for row in rows], "curves": _by_name(curves)}
    write_whole(options.out / "results.json", (json.dumps(report, indent=2) + "\n").encode())
    write_whole(options.out / "results.md", _markdown(rows, facts).encode())
    write_whole(options.out / "curves.png", _picture(curves, options))
    print(f"wrote results.json, results.md and curves.png to {options.out}")


def train(learners: list[Learner], data: Data, options: Options, advance: Callable[[str], None]) -> list[Curve]:
    """Both networks see the same batches in the same order. ``advance`` is told of every batch."""
    here = learners[0].processes
    curves = [Curve([], []) for _ in learners]
    text = "training"
    for epoch in range(options.epochs):
        for images, labels in training_batches(data, BATCH, options.seed, epoch, here):
            for learner in learners:
                learner.step(images, labels)
            advance(text)
        for learner, curve in zip(learners, curves, strict=True):
            curve.train.append(learner.finish_epoch())
            curve.test.append(learner.evaluate(evaluation_batches(data, 256, here)))
        text = "test accuracy " + " / ".join(f"{100 * curve.test[-1].accuracy:.1f} %" for curve in curves)
    return curves


def compare(learners: list[Learner], data: Data, curves: list[Curve], rounds: int) -> list[Row]:
    """The table: sizes, accuracies, and times measured in turns."""
    networks = [learner.network for learner in learners]
    device = learners[0].processes.device
    shape = (1, data.channels, data.size, data.size)
    batches: dict[int, tuple[Tensor, Tensor]] = {}
    for count in (1, BATCH):
        images = torch.rand((count, *shape[1:]), device=device).contiguous(memory_format=torch.channels_last)
        batches[count] = images, torch.arange(count, device=device) % data.classes

    def ratio(quantity: str, unit: str, values: list[float]) -> Row:
        return Row(quantity, unit, values[0], values[1], values[1] / values[0])

    def timing(quantity: str, subjects: list[Callable[[], None]], repeats: int) -> Row:
        seconds = measure.interleaved(subjects, device, rounds=rounds, repeats=repeats)
        medians = [1e3 * statistics.median(times) for times in seconds]
        return Row(quantity, "ms", medians[0], medians[1], measure.median_ratio(seconds[1], seconds[0]))

    last = [100 * curve.test[-1].accuracy for curve in curves]
    return [
        ratio("parameters", "", [measure.count_parameters(network) for network in networks]),
        ratio("MACs per image", "millions", [measure.count_macs(network, shape) / 1e6 for network in networks]),
        Row("test accuracy", "%", last[0], last[1], last[1] - last[0]),
        timing("latency, batch 1", [measure.forward_pass(n, batches[1][0]) for n in networks], 5),
        timing(f"latency, batch {BATCH}", [measure.forward_pass(n, batches[BATCH][0]) for n in networks], 1),
        timing(f"training step, batch {BATCH}", [measure.training_step(n, *batches[BATCH]) for n in networks], 1),
        ratio(
            f"kept for backward, batch {BATCH}",
            "MB",
            [measure.count_saved_bytes(network, *batches[BATCH]) / 1e6 for network in networks],
        ),
    ]


def describe(learners: list[Learner], data: Data, options: Options) -> dict[str, Any]:
    """What ran, and where."""
    device = learners[0].processes.device
    probe = torch.empty(1, 1, 1, 1, device=device)
    return {
        "model": "ResNet-20",
        "alpha": options.alpha,
        "branch_norm": options.branch_norm,
        "data": f"scikit-learn digits, {data.size} x {data.size}, {length(data.test)} for testing",
        "epochs": options.epochs,
        "seed": options.seed,
        "backend": dispatch.choose(probe),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _caption(facts: dict[str, Any]) -> str:
    plural = "s" if facts["threads"] > 1 else ""
    where = f"CPU, {facts['threads']} thread{plural}" if facts["device"] == "CPU" else facts["device"]
    return f"{facts['data']}, {facts['epochs']} epochs; backend {facts['backend']} on {where}; torch {facts['torch']}"


def _headings(facts: dict[str, Any]) -> tuple[str, str, str]:
    return "vanilla", f"SPConv {facts['alpha']:g}", "ratio"


def _table(rows: list[Row], facts: dict[str, Any]) -> Any:
    module = need("rich.table", "the demo")
    table = module.Table(
        title=f"{facts['model']}, vanilla and SPConv at alpha {facts['alpha']:g}", caption=_caption(facts)
    )
    table.add_column("", no_wrap=True)
    for heading in _headings(facts):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row.texts())
    return table


def _markdown(rows: list[Row], facts: dict[str, Any]) -> str:
    lines = ["| | " + " | ".join(_headings(facts)) + " |", "|---|---:|---:|---:|"]
    lines += ["| " + " | ".join(row.texts()) + " |" for row in rows]
    return "\n".join(lines) + f"\n\n{_caption(facts)}\n"


def _by_name(curves: list[Curve]) -> dict[str, Any]:
    return {
        name: {kind: [score._asdict() for score in getattr(curve, kind)] for kind in ("train", "test")}
        for name, curve in zip(NAMES, curves, strict=True)
    }


def _picture(curves: list[Curve], options: Options) -> bytes:
    """The learning curves as a PNG."""
    figure_module = need("matplotlib.figure", "the demo")
    figure = figure_module.Figure(figsize=(9, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    figure.suptitle("ResNet-20 on handwritten digits: vanilla and SPConv")
    epochs = range(1, options.epochs + 1)
    for name, curve, colour in zip((NAMES[0], f"SPConv, alpha {options.alpha:g}"), curves, ("C0", "C1"), strict=True):
        losses.plot(epochs, [score.loss for score in curve.train], colour, label=f"{name}, training")
        losses.plot(epochs, [score.loss for score in curve.test], colour, linestyle="--", label=f"{name}, test")
        accuracies.plot(epochs, [100 * score.accuracy for score in curve.test], colour, marker=".", label=name)
    losses.set(xlabel="epoch", ylabel="cross-entropy (nats)", yscale="log", title="Loss")
    accuracies.set(xlabel="epoch", ylabel="test accuracy (%)", title="Test accuracy")
    for axes in (losses, accuracies):
        axes.legend()
        axes.grid(alpha=0.3)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
