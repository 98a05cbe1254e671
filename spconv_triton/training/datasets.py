"""The data sets by name: scikit-learn's digits, CIFAR-10 in its binary version, and folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Data, Images
from .errors import UserError, need

CIFAR10_TRAIN = tuple(f"data_batch_{index}.bin" for index in range(1, 6))
CIFAR10_TEST = ("test_batch.bin",)
CIFAR10_RECORD = 1 + 3 * 32 * 32
"""Bytes: a label, then the red, green and blue plane."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(source: str, size: int | None = None, samples: int | None = None) -> Data:
    """The data set that ``--data`` names.

    Args:
        source: ``digits``, ``cifar10:DIR`` or ``folder:DIR``.
        size: height and width of the images, pixels; None takes the set's own (16 for digits, 224 for folders).
        samples: keep so many training images, evenly spread, for a quick look; None keeps all. Not for folders.

    Raises:
        UserError: an unknown name, a size or number of samples the set cannot have, files that are missing or
            damaged, or a missing dependency.
    """
    kind, _, place = source.partition(":")
    if size is not None and size < 8:
        raise UserError(f"--image-size must be at least 8, got {size}")
    if source == "digits":
        return digits(size or 16, samples)
    if kind == "cifar10" and place:
        if size not in (None, 32):
            raise UserError(f"--image-size must be 32 for cifar10, got {size}")
        return cifar10(Path(place), samples)
    if kind == "folder" and place:
        if samples is not None:
            raise UserError("--samples does not go with a folder; leave images out of the folder instead")
        return folder(Path(place), size or 224)
    raise UserError(f"--data must be digits, cifar10:DIR or folder:DIR, got {source!r}")


def digits(size: int = 16, samples: int | None = None) -> Data:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, enlarged to ``size`` x ``size``; one in five is for testing.

    The split is stratified and the same at every call.
    """
    purpose = "the digits data set"
    read = need("sklearn.datasets", purpose).load_digits()
    split: Any = need("sklearn.model_selection", purpose).train_test_split
    train, test = split(range(len(read.target)), test_size=0.2, random_state=0, stratify=read.target)
    small = torch.from_numpy(read.images).float()[:, None] / 16
    images = F.interpolate(small, (size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(read.target).long()
    kept = _spread(train, samples)
    std, mean = torch.std_mean(images[train])
    return Data(
        Images(images[kept], labels[kept]),
        Images(images[test], labels[test]),
        classes=10,
        channels=1,
        size=size,
        mean=(mean.item(),),
        std=(std.item(),),
        shift=max(size // 8, 1),  # one pixel of the original; a mirrored digit is another sign, so no flips
    )


def cifar10(directory: Path, samples: int | None = None) -> Data:
    """CIFAR-10 from the folder of its binary version, ``cifar-10-batches-bin`` or the folder that holds it.

    Raises:
        UserError: no such folder, only the python version (whose files are pickles, which run code when opened), or
            files that are missing or not whole records.
    """
    _check_directory(directory)
    inner = directory / "cifar-10-batches-bin"
    if inner.is_dir():
        directory = inner
    missing = [name for name in (*CIFAR10_TRAIN, *CIFAR10_TEST) if not (directory / name).is_file()]
    if missing:
        pickled = (directory / "data_batch_1", directory / "cifar-10-batches-py" / "data_batch_1")
        if any(path.is_file() for path in pickled):
            raise UserError(
                f"--data: {directory} holds the python version of CIFAR-10, whose pickles are not opened; "
                "get the binary version, cifar-10-binary.tar.gz"
            )
        raise UserError(
            f"--data: {directory} has no {missing[0]}; expected the binary version of CIFAR-10 "
            "(cifar-10-binary.tar.gz, unpacked)"
        )
    images, labels = _read_cifar10([directory / name for name in CIFAR10_TRAIN])
    test_images, test_labels = _read_cifar10([directory / name for name in CIFAR10_TEST])
    kept = _spread(list(range(len(labels))), samples)
    return Data(
        Images(images[kept], labels[kept]),
        Images(test_images, test_labels),
        classes=10,
        channels=3,
        size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        shift=4,
        flip=True,
    )


def folder(directory: Path, size: int = 224) -> Data:
    """A folder of images, ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg`` (or ``test/``), as torchvision's ImageFolder.

    Training images are cropped at random to 8 to 100 % of their area and mirrored, test images cropped at the centre.

    Raises:
        UserError: folders that are missing, empty, or disagree on the classes.
    """
    _check_directory(directory)
    torchvision = need("torchvision", "a folder of images")
    held_out = next((directory / name for name in ("val", "test") if (directory / name).is_dir()), None)
    if held_out is None or not (directory / "train").is_dir():
        raise UserError(
            f"--data: {directory} must hold the folders train and val (or test), a folder per class in each"
        )
    transforms = torchvision.transforms
    augment = transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    plain = transforms.Compose([transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), transforms.ToTensor()])
    try:
        train, test = (
            torchvision.datasets.ImageFolder(str(path), transform, loader=_read_image)
            for path, transform in ((directory / "train", augment), (held_out, plain))
        )
    except OSError as error:
        raise UserError(f"--data: {str(error).splitlines()[0]}") from error
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"--data: train and {held_out.name} of {directory} must have the same classes; only one has {odd}"
        )
    return Data(train, test, len(train.classes), 3, size, IMAGENET_MEAN, IMAGENET_STD)


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise UserError(f"--data: there is no folder {directory}")


def _read_cifar10(paths: list[Path]) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] uint8 and labels [N] of files in CIFAR-10's binary format."""
    parts = []
    for path in paths:
        try:
            content = bytearray(path.read_bytes())
        except OSError as error:
            raise UserError(f"--data: cannot read {path}: {error.strerror}") from error
        if not content or len(content) % CIFAR10_RECORD:
            raise UserError(
                f"--data: {path} must be whole records of {CIFAR10_RECORD} bytes, got {len(content)} bytes; "
                "it is damaged or not CIFAR-10's binary version"
            )
        records = torch.frombuffer(content, dtype=torch.uint8).view(-1, CIFAR10_RECORD)
        if records[:, 0].max() > 9:
            raise UserError(f"--data: {path} must have labels of 0 to 9, got {int(records[:, 0].max())}")
        parts.append(records)
    records = torch.cat(parts)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()


def _read_image(path: str) -> Any:
    image = need("PIL.Image", "a folder of images")
    try:
        with image.open(path) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        raise UserError(f"--data: cannot read the image {path}: {error}") from error


def _spread(indices: list[int], samples: int | None) -> list[int]:
    if samples is None:
        return indices
    if not 1 <= samples <= len(indices):
        raise UserError(f"--samples must be between 1 and {len(indices)}, got {samples}")
    return [indices[position * len(indices) // samples] for position in range(samples)]
