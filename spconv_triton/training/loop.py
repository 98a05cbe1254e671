"""A training run: epochs, checkpoints, log, and going on where a run stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .. import models
from . import checkpoint
from .data import WEIGHTS, Data, evaluation_batches, seed_epoch, steps_per_epoch, training_batches
from .datasets import load
from .errors import UserError
from .files import append_line, make_folder, write_whole
from .learner import Learner, Recipe
from .measure import count_parameters
from .processes import Processes, cpu_threads, processes, telling_of_memory

LAST, BEST, LOG = "last.pt", "best.pt", "metrics.jsonl"

SMALLEST = {"vgg16": 32}
"""Pixels that a network needs to have one left at its end."""


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run; a run is resumed under the settings it began with.

    Attributes:
        model: a name in ``models.MODELS``.
        alpha: ratio of representative channels; None trains the vanilla network.
        groups, branch_norm: of the SPConv layers.
        data: ``digits``, ``cifar10:DIR`` or ``folder:DIR``; only the kind before the colon must stay.
        image_size: pixels; None takes the data set's own.
        samples: training images to keep; None keeps all.
        epochs: of the whole run; the learning rate falls to zero at its end.
        batch_size: samples of a step over all processes together.
        lr: peak learning rate.
        weight_decay: L2 penalty.
        seed: of the weights, the order of the images and their augmentation.
        amp: ``"none"``, ``"bfloat16"`` or ``"float16"``.
    """

    model: str
    alpha: float | None
    groups: int
    branch_norm: bool
    data: str
    image_size: int | None
    samples: int | None
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int
    amp: str


@dataclass(frozen=True)
class Surroundings:
    """Where and how a run happens; may change when it is resumed.

    Attributes:
        out: folder of the checkpoints and the log.
        resume: checkpoint to go on from; None starts afresh.
        device: as of ``--device``.
        threads: of the CPU, for each process; None takes PyTorch's default.
        workers: processes that load images; those of a folder each draw the augmentation of their own share.
        compile: pass the network through ``torch.compile``.
        save_every: epochs between checkpoints; the last epoch is always kept.
        parallel: ``"ddp"`` or ``"fsdp"``; see :class:`Recipe`.
    """

    out: Path
    resume: Path | None
    device: str
    threads: int | None
    workers: int
    compile: bool
    save_every: int
    parallel: str


Report = Callable[[str], None]


def run(settings: Settings, surroundings: Surroundings, report: Report) -> None:
    """Train to the end of ``settings.epochs``.

    Writes ``last.pt`` and ``best.pt`` (checkpoints) and ``metrics.jsonl`` (a line per epoch) to ``surroundings.out``.
    Rank 0 alone writes and reports.

    Raises:
        UserError: settings, data, files or a machine that will not do.
    """
    out, resume = surroundings.out, surroundings.resume
    goes_on = resume is not None and resume.parent.resolve() == out.resolve()
    if not goes_on:
        _refuse_another_run(out)
    advice = "a smaller --batch-size or --image-size, or fewer --threads"
    with telling_of_memory(advice, "a smaller --batch-size or --image-size"):
        data = load(settings.data, settings.image_size, settings.samples)
        with cpu_threads(surroundings.threads):
            _run(settings, surroundings, data, report)


def _refuse_another_run(out: Path) -> None:
    if not any((out / name).is_file() for name in (LAST, BEST, LOG)):
        return
    if (out / LAST).is_file():
        advice = "go on with it (--resume) or choose another folder"
    elif (out / BEST).is_file():  # it ended before its first last.pt
        advice = f"go on with it (--resume {out / BEST}) or choose another folder"
    else:
        advice = f"without a checkpoint; remove its {LOG} or choose another folder"
    raise UserError(f"--out {out} holds a run already; {advice}")


def _run(settings: Settings, surroundings: Surroundings, data: Data, report: Report) -> None:
    with processes(surroundings.device) as here:
        steps = steps_per_epoch(data, settings.batch_size, here.world) * settings.epochs
        network = build(settings, data)
        recipe = Recipe(
            settings.lr,
            settings.weight_decay,
            steps,
            amp=settings.amp,
            compile=surroundings.compile,
            parallel=surroundings.parallel,
        )
        start, best = 0, -math.inf
        learner = Learner(network, recipe, here)
        if surroundings.resume is not None:
            start, best = _take_up(surroundings.resume, settings, learner)
        if here.is_main:
            make_folder(surroundings.out)
            parameters = count_parameters(network)
            report(
                f"{settings.model}, alpha {settings.alpha}: {parameters:,} parameters, on {here.device}, "
                f"{here.world} process{'es' if here.world > 1 else ''}"
            )
            _drop_lines(surroundings.out / LOG, start)
            if start:
                report(f"going on after epoch {start} of {surroundings.resume}")
        for epoch in range(start, settings.epochs):
            record = _epoch(learner, data, settings, surroundings, epoch, here)
            improved, best = record["test_accuracy"] > best, max(best, record["test_accuracy"])
            if here.is_main:  # before the checkpoint: a line too many is dropped when the run goes on, none is missing
                append_line(surroundings.out / LOG, json.dumps(record))
            _keep(learner, settings, surroundings, epoch + 1, best, improved)
            if here.is_main:
                report(
                    f"epoch {epoch + 1}/{settings.epochs}: training loss {record['train_loss']:.4f}, test loss "
                    f"{record['test_loss']:.4f}, test accuracy {100 * record['test_accuracy']:.2f} %, "
                    f"{record['seconds']:.1f} s"
                )
        here.wait()
        if here.is_main:
            report(f"best test accuracy {100 * best:.2f} %; {_written(surroundings)}")


def _written(surroundings: Surroundings) -> str:
    """Where what a run wrote is; one that went on elsewhere, and got no better, has no best of its own."""
    names = [name for name in (BEST, LAST, LOG) if (surroundings.out / name).is_file()]
    here = f"{', '.join(names)} in {surroundings.out}" if names else f"nothing new in {surroundings.out}"
    return here if BEST in names else f"{here}; the best network is an earlier one: look beside {surroundings.resume}"


def _drop_lines(log: Path, epochs: int) -> None:
    """Leave the log's lines of the first ``epochs`` epochs, from which a run goes on; all of them, if it is damaged."""
    try:
        lines = log.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["epoch"] <= epochs]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or not ours to mend
        return
    if len(kept) < len(lines):
        write_whole(log, b"".join(kept))


def build(settings: Settings, data: Data) -> nn.Module:
    """The network of a run, freshly initialised from its seed.

    Raises:
        UserError: an unknown model, images too small for it, or an alpha or groups that it cannot have.
    """
    if settings.model not in models.MODELS:
        raise UserError(f"--model must be one of {', '.join(models.MODELS)}, got {settings.model!r}")
    smallest = SMALLEST.get(settings.model, 1)
    if data.size < smallest:
        raise UserError(f"--image-size must be at least {smallest} for {settings.model}, got {data.size}")
    seed_epoch(settings.seed, WEIGHTS)
    try:
        return models.MODELS[settings.model](
            settings.alpha,
            classes=data.classes,
            in_channels=data.channels,
            groups=settings.groups,
            branch_norm=settings.branch_norm,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"--{error}") from error


def _epoch(
    learner: Learner, data: Data, settings: Settings, surroundings: Surroundings, epoch: int, here: Processes
) -> dict[str, Any]:
    """Train and test once; what the log says of it."""
    begin = time.perf_counter()
    lr = learner.scheduler.get_last_lr()[0]
    for images, labels in training_batches(data, settings.batch_size, settings.seed, epoch, here, surroundings.workers):
        learner.step(images, labels)
    train = learner.finish_epoch()
    _refuse_divergence(epoch, "loss", train.loss)
    test = learner.evaluate(
        evaluation_batches(data, max(settings.batch_size // here.world, 1), here, surroundings.workers)
    )
    _refuse_divergence(epoch, "test loss", test.loss)
    return {
        "epoch": epoch + 1,
        "lr": lr,
        "train_loss": train.loss,
        "train_accuracy": train.accuracy,
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
        "seconds": round(time.perf_counter() - begin, 3),
    }


def _refuse_divergence(epoch: int, name: str, loss: float) -> None:
    if not math.isfinite(loss):
        raise UserError(f"training diverged in epoch {epoch + 1}: the {name} is {loss}; try a lower --lr")


def _keep(
    learner: Learner, settings: Settings, surroundings: Surroundings, epoch: int, best: float, improved: bool
) -> None:
    """Write the checkpoints that are due; all processes give what they hold, and rank 0 writes.

    The best goes first: should the run end between the two, the epoch is repeated from the older ``last.pt``.
    """
    due = {BEST: improved, LAST: epoch % surroundings.save_every == 0 or epoch == settings.epochs}
    if not any(due.values()):
        return
    state = learner.state_dict()
    if learner.processes.is_main:
        for name in (name for name, wanted in due.items() if wanted):
            checkpoint.save(surroundings.out / name, settings=asdict(settings), epoch=epoch, best=best, state=state)


def _take_up(path: Path, settings: Settings, learner: Learner) -> tuple[int, float]:
    """Load a checkpoint into the learner; its epoch and best accuracy."""
    content = checkpoint.load(path)
    began = content["settings"]
    for name, value in asdict(settings).items():
        then = began.get(name) if isinstance(began, dict) else None
        if name == "data" and isinstance(then, str):
            value, then = value.partition(":")[0], then.partition(":")[0]
        if value != then:
            wanted = ("none" if name == "alpha" else "left out") if then is None else str(then)
            raise UserError(f"--{name.replace('_', '-')} must be {wanted} to go on with {path}, got {value}")
    try:
        learner.load_state_dict(content["state"])
        return int(content["epoch"]), float(content["best"])
    except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"the checkpoint {path} does not fit --model {settings.model} and the classes of --data, or its state is "
            "damaged"
        ) from error
