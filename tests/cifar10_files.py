"""A small data set in the file format of CIFAR-10's binary version."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from spconv_triton.training.datasets import CIFAR10_TEST, CIFAR10_TRAIN


def write_cifar10(folder: Path, images: Tensor, labels: Tensor) -> None:
    """The images, bytes of [3, 32, 32], as many in each file: five of training, then that of the test."""
    folder.mkdir(parents=True)
    records = [bytes([label]) + image.numpy().tobytes() for label, image in zip(labels.tolist(), images, strict=True)]
    names = (*CIFAR10_TRAIN, *CIFAR10_TEST)
    each = len(records) // len(names)
    for index, name in enumerate(names):
        (folder / name).write_bytes(b"".join(records[index * each : (index + 1) * each]))
