"""Mistakes on the command line: what stands on the disk, the command, parts of the one line that it ends in."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from spconv_triton.training import checkpoint, cli, datasets, demo, loop
from spconv_triton.training.errors import UserError

SMALL = "--samples 32 --batch-size 16 --image-size 8 --epochs 1 --device cpu --threads 1"


@dataclass(frozen=True)
class Command:
    """One mistake.

    Attributes:
        arguments: what follows ``python -m spconv_triton``.
        parts: of what is printed.
        where: the circumstances, as the documentation tells them.
        prepare: makes them, in an empty folder; what it returns holds while the command runs.
        needs: a module without which the command ends earlier, with another message.
    """

    arguments: str
    parts: tuple[str, ...]
    where: str = ""
    prepare: Callable[[], AbstractContextManager[Any] | None] = nullcontext
    needs: str | None = None

    @functools.cache  # noqa: B019, a list of constants keeps all commands anyway
    def provoke(self) -> tuple[BaseException, str]:
        """What the command ends with, and the line that it prints.

        Raises:
            AssertionError: it ends well, or says something else.
        """
        error, line = self._run()
        missing = [part for part in self.parts if part not in line]
        assert not missing, f"{missing} not in: {line}"
        return error, line

    def _run(self) -> tuple[BaseException, str]:
        before = Path.cwd()
        printed = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            os.chdir(folder)
            try:
                with self.prepare() or nullcontext(), contextlib.redirect_stderr(printed):
                    options = cli.make_parser().parse_args(shlex.split(self.arguments))
                    options.run(options)
            except SystemExit as error:  # argparse's
                return error, printed.getvalue().strip()
            except UserError as error:
                return error, f"{cli.PROGRAM}: error: {error}"
            finally:
                os.chdir(before)
        raise AssertionError(f"no error from: {self.arguments}")


def _full_disk() -> AbstractContextManager[Any]:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return mock.patch.object(os, "replace", side_effect=error)


def _trained() -> None:
    assert cli.main(f"train {SMALL} --out runs/slim".split()) == 0


def _trained_and_cut() -> None:
    _trained()
    path = Path("runs/slim/last.pt")
    content = checkpoint.load(path)
    del content["state"]["network"]["fc.bias"]
    torch.save(content, path)


def _one_wrong_bit() -> None:
    torch.save({"weight": torch.arange(64.0)}, "last.pt")
    content = bytearray(Path("last.pt").read_bytes())
    content[content.index(torch.arange(64.0).numpy().tobytes()) + 130] ^= 1
    Path("last.pt").write_bytes(content)


def _cifar10(record: bytes) -> None:
    Path("data").mkdir()
    for name in (*datasets.CIFAR10_TRAIN, *datasets.CIFAR10_TEST):
        (Path("data") / name).write_bytes(record)


def _images(*files: str) -> None:
    for file in files:
        path = Path("data") / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image")


def _pickles() -> None:
    Path("data").mkdir()
    Path("data/data_batch_1").touch()


def _without_gpu() -> AbstractContextManager[Any]:
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: False))
    stack.enter_context(mock.patch.object(torch.cuda, "device_count", lambda: 0))
    return stack


COMMANDS = [
    Command("demo --samples 10", ("--samples must be at least 64, got 10",)),
    Command("demo --image-size 1", ("--image-size must be at least 8, got 1",)),
    Command("demo --epochs 0", ("argument --epochs: must be an integer of at least 1, got '0'",)),
    Command("train --workers -1", ("argument --workers: must be an integer of at least 0", "got '-1'")),
    Command("train --lr nan", ("argument --lr: must be a number of float32 of at least 0, got 'nan'",)),
    Command(
        "train --weight-decay 1e39", ("argument --weight-decay: must be a number of float32 of at least 0, got '1e39'",)
    ),
    Command("demo --alpha 0", ("argument --alpha: must be in (0, 1], as 0.5 or 1/2, got '0'",)),
    Command("train --alpha 3/2", ("must be in (0, 1], as 0.5 or 1/2, got '3/2'; none trains the vanilla network",)),
    Command("train --model resnet21", ("--model must be one of resnet20, resnet50, vgg16, got 'resnet21'",)),
    Command("train --groups 3", ("--groups must divide out_channels=16, got groups=3",)),
    Command("train --model vgg16", ("--image-size must be at least 32 for vgg16, got 16",)),
    Command("train --image-size 7", ("--image-size must be at least 8, got 7",)),
    Command("train --samples 9999", ("--samples must be between 1 and 1437, got 9999",)),
    Command("train --batch-size 1", ("--batch-size must be at least 2, two per process, got 1",)),
    Command("train --batch-size 2000", ("--batch-size must be at most the 1437 training images, got 2000",)),
    Command("train --device abacus", ("--device must be auto, cpu, cuda or cuda:N, got 'abacus'",)),
    Command("train --device cuda", ("--device cuda: there is no such device",), "without a GPU", _without_gpu),
    Command(
        f"train {SMALL}",
        ("needs scikit-learn", "pip install 'split-conv-triton[train]'"),
        "without scikit-learn",
        lambda: mock.patch.dict(sys.modules, {"sklearn.datasets": None}),
    ),
    Command(
        f"train {SMALL}",
        ("out of memory on the device; try a smaller --batch-size or --image-size",),
        "with too large a batch",
        lambda: mock.patch.object(loop, "_run", side_effect=torch.OutOfMemoryError("out of memory")),
    ),
    Command(
        f"train {SMALL}",
        ("out of memory; try a smaller --batch-size or --image-size, or fewer --threads",),
        "on a machine with too little memory",
        lambda: mock.patch.object(loop, "_run", side_effect=RuntimeError("DefaultCPUAllocator: can't allocate memory")),
    ),
    Command(
        f"train {SMALL}",
        ("WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT not set: torchrun sets them all",),
        "with WORLD_SIZE=2",
        lambda: mock.patch.dict(os.environ, WORLD_SIZE="2"),
    ),
    Command(
        f"train {SMALL}",
        ("WORLD_SIZE in the environment must be an integer of at least 1, got ''",),
        "with an empty WORLD_SIZE",
        lambda: mock.patch.dict(os.environ, WORLD_SIZE=""),
    ),
    Command(
        f"train {SMALL}",
        ("MASTER_PORT in the environment must be an integer of at least 0, got 'abc'",),
        "with WORLD_SIZE=2 and a MASTER_PORT that is no number",
        lambda: mock.patch.dict(os.environ, WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="abc"),
    ),
    Command(
        "demo",
        ("out of memory on the device; try a smaller --image-size",),
        "on a GPU with too little memory",
        lambda: mock.patch.object(demo, "show", side_effect=torch.OutOfMemoryError("out of memory")),
    ),
    Command(
        "demo --samples 64 --image-size 200000", ("out of memory; try a smaller --image-size, or fewer --samples",)
    ),
    Command(f"train {SMALL} --epochs 3 --lr 1e30", ("training diverged in epoch", "try a lower --lr")),
    Command("train --data mnist", ("--data must be digits, cifar10:DIR or folder:DIR, got 'mnist'",)),
    Command("train --data cifar10:nowhere", ("--data: there is no folder nowhere",)),
    Command("train --data cifar10:data --image-size 16", ("--image-size must be 32 for cifar10, got 16",)),
    Command(
        "train --data cifar10:data",
        ("--data: data has no data_batch_1.bin; expected the binary version",),
        "with an empty folder",
        lambda: Path("data").mkdir(),
    ),
    Command(
        "train --data cifar10:data",
        ("--data: data holds the python version of CIFAR-10", "cifar-10-binary.tar.gz"),
        "with the pickles",
        _pickles,
    ),
    Command(
        "train --data cifar10:data",
        ("must be whole records of 3073 bytes, got 100 bytes",),
        "with files that are cut off",
        lambda: _cifar10(bytes(100)),
    ),
    Command(
        "train --data cifar10:data",
        ("must have labels of 0 to 9, got 11",),
        "with CIFAR-100's files, say",
        lambda: _cifar10(b"\x0b" + bytes(3072)),
    ),
    Command("train --data folder:data --samples 9", ("--samples does not go with a folder",)),
    Command(
        "train --data folder:data",
        ("--data: data must hold the folders train and val (or test)",),
        "with an empty folder",
        lambda: Path("data").mkdir(),
        needs="torchvision",
    ),
    Command(
        "train --data folder:data",
        ("--data: train and val of data must have the same classes; only one has ['blue', 'green']",),
        "with another class in each",
        lambda: _images("train/red/1.png", "train/blue/1.png", "val/red/1.png", "val/green/1.png"),
        needs="torchvision",
    ),
    Command(
        "train --data folder:data",
        ("--data: ",),
        "with folders that hold no images",
        lambda: _images("train/red/1.txt", "val/red/1.txt"),
        needs="torchvision",
    ),
    Command(
        "train --data folder:data --image-size 16 --batch-size 2 --device cpu",
        ("--data: cannot read the image data/train/red/",),
        "with a file that is no image",
        lambda: _images("train/red/1.png", "train/red/2.png", "val/red/1.png"),
        needs="torchvision",
    ),
    Command(
        f"train {SMALL} --out file",
        ("cannot create the folder file: File exists",),
        "with a file of that name",
        lambda: Path("file").touch(),
    ),
    Command(
        f"train {SMALL} --out runs/slim",
        ("cannot write runs/slim/", "No space left on device"),
        "on a full disk",
        _full_disk,
    ),
    Command(
        f"train {SMALL} --out runs/slim",
        ("cannot write runs/slim/metrics.jsonl: Is a directory",),
        "with a folder of that name",
        lambda: Path("runs/slim/metrics.jsonl").mkdir(parents=True),
    ),
    Command(f"train {SMALL} --out runs/slim", ("--out runs/slim holds a run already",), "a second time", _trained),
    Command(
        f"train {SMALL} --out runs/slim --epochs 2 --resume",
        ("--epochs must be 1 to go on with runs/slim/last.pt, got 2",),
        "after a run of one epoch",
        _trained,
    ),
    Command(f"train {SMALL} --resume last.pt", ("cannot read the checkpoint last.pt: No such file or directory",)),
    Command(
        f"train {SMALL} --resume last.pt",
        ("last.pt is damaged or not a checkpoint of spconv_triton",),
        "with a file that is cut off",
        lambda: Path("last.pt").write_bytes(b"PK") and None,
    ),
    Command(
        f"train {SMALL} --resume last.pt",
        ("the checkpoint last.pt is damaged: wrong checksum in last/data/0",),
        "with one wrong bit",
        _one_wrong_bit,
    ),
    Command(
        f"train {SMALL} --resume last.pt",
        ("last.pt is not a checkpoint of spconv_triton (its format must be",),
        "with a state dict",
        lambda: torch.save({"weight": torch.ones(2)}, "last.pt"),
    ),
    Command(
        f"train {SMALL} --resume runs/slim/last.pt --out runs/more",
        ("the checkpoint runs/slim/last.pt does not fit --model resnet20 and the classes of --data, or its state is",),
        "with a parameter missing",
        _trained_and_cut,
    ),
]
