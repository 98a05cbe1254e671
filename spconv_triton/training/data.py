"""Batches: raw images in, network input on the device out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from .errors import UserError
from .processes import Processes

Batch = tuple[Tensor, Tensor]

IGNORED = -100
"""A label that counts for nothing: what ``cross_entropy`` ignores by default."""

WEIGHTS = -1
"""The "epoch" in which weights are drawn."""


class Images(Dataset[Batch]):
    """Images in memory, fetched a batch at a time.

    Args:
        images: [N, C, H, W], uint8 or float32.
        labels: [N], int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.images[index], self.labels[index]


@dataclass(frozen=True)
class Data:
    """A data set, split, with what turns its raw images into a network's input.

    Attributes:
        train, test: give (image [C, H, W], label); uint8 in [0, 255] or float32 in [0, 1].
        classes: number of labels.
        channels: C.
        size: H and W, pixels.
        mean, std: of the training images in [0, 1], one per channel.
        shift: training images are moved by up to so many pixels, the border filled with zeros.
        flip: training images are mirrored half of the time.
    """

    train: Dataset[Batch]
    test: Dataset[Batch]
    classes: int
    channels: int
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    shift: int = 0
    flip: bool = False

    def prepare(self, images: Tensor, device: torch.device, *, augment: bool, rank: int = 0, world: int = 1) -> Tensor:
        """Raw images [N, C, H, W] as input: on ``device``, augmented, normalised, float32, channels_last.

        Augmentation draws from PyTorch's global generator of the CPU, for all N ``world`` images of a batch that the
        processes share: numbers ``rank``, ``rank`` + ``world``, ... are for these.
        """
        images = images.to(device, non_blocking=True)
        images = images.float().div_(255) if images.dtype == torch.uint8 else images
        if augment and self.shift:
            images = random_shift(images, self.shift, rank, world)
        if augment and self.flip:
            mirrored = (torch.rand(len(images) * world)[rank::world] < 0.5).to(device)[:, None, None, None]
            images = torch.where(mirrored, images.flip(3), images)
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (self.mean, self.std))
        return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def random_shift(images: Tensor, reach: int, rank: int = 0, world: int = 1) -> Tensor:
    """Each image of [N, C, H, W] moved by -reach to reach pixels in both directions, zeros moving in.

    Offsets are drawn as in :meth:`Data.prepare`.
    """
    count, _, height, width = images.shape
    offsets = torch.randint(0, 2 * reach + 1, (2, count * world, 1))[:, rank::world].to(images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)  # [N, H]
    columns = offsets[1] + torch.arange(width, device=images.device)  # [N, W]
    padded = F.pad(images, (reach, reach, reach, reach))
    sample = torch.arange(count, device=images.device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]  # [N, H, W, C]
    return moved.permute(0, 3, 1, 2)


def seed_epoch(seed: int, epoch: int, rank: int = 0) -> None:
    """Seed PyTorch's generators for one epoch of one process.

    Every random number of an epoch follows from (seed, epoch, rank), so a run that resumes at an epoch draws what the
    uninterrupted run drew there, with no generator state to keep.
    """
    digest = hashlib.sha256(f"{seed} {epoch} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def training_batches(
    data: Data, batch_size: int, seed: int, epoch: int, processes: Processes, workers: int = 0
) -> Iterator[Batch]:
    """One epoch of shuffled, augmented training batches of this process, (input, labels) on its device.

    A batch holds the same images however many processes share it, and what :meth:`Data.prepare` draws for them is the
    same too. What a data set draws for each image (a folder's crops) depends on the number of processes.

    Args:
        batch_size: samples of a batch over all processes together. The rest that does not fill one is left out.
        workers: processes that load images.
    """
    seed_epoch(seed, epoch, 0 if data.shift or data.flip else processes.rank)
    sampler: DistributedSampler[Batch] = DistributedSampler(
        data.train, processes.world, processes.rank, shuffle=True, seed=seed, drop_last=True
    )
    sampler.set_epoch(epoch)
    loader = _loader(data.train, batch_size // processes.world, processes, workers, sampler=sampler, drop_last=True)
    for images, labels in loader:
        inputs = data.prepare(images, processes.device, augment=True, rank=processes.rank, world=processes.world)
        yield inputs, labels.to(processes.device)


def evaluation_batches(data: Data, batch_size: int, processes: Processes, workers: int = 0) -> Iterator[Batch]:
    """This process's share of the test set, in order, (input, labels) on its device.

    Every process gets as many batches of the same sizes, since a sharded network is gathered for each: a share that is
    one short is filled up with an image whose label is ``IGNORED``.
    """
    count = length(data.test)
    share = range(processes.rank, count, processes.world)
    filled = Subset(data.test, [*share, *range(math.ceil(count / processes.world) - len(share))])
    left = len(share)
    for images, labels in _loader(filled, batch_size, processes, workers):
        labels[left:] = IGNORED
        left = max(left - len(labels), 0)
        yield data.prepare(images, processes.device, augment=False), labels.to(processes.device)


def steps_per_epoch(data: Data, batch_size: int, world: int) -> int:
    """Training batches of an epoch.

    Raises:
        UserError: a batch size that the processes cannot share, of one sample each, which a batch norm cannot
            normalise, or of more samples than there are.
    """
    if batch_size < 2 * world:
        raise UserError(f"--batch-size must be at least {2 * world}, two per process, got {batch_size}")
    if batch_size % world:
        raise UserError(f"--batch-size must be a multiple of the {world} processes that share it, got {batch_size}")
    samples = length(data.train) // world
    if samples * world < batch_size:
        raise UserError(f"--batch-size must be at most the {samples * world} training images, got {batch_size}")
    return samples // (batch_size // world)


def length(dataset: Dataset[Batch]) -> int:
    """Samples of a data set that knows how many it has, as all of ours do."""
    return len(dataset)  # type: ignore[arg-type]


def _loader(
    dataset: Dataset[Batch],
    batch_size: int,
    processes: Processes,
    workers: int,
    sampler: DistributedSampler[Batch] | None = None,
    drop_last: bool = False,
) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        drop_last=drop_last,
        pin_memory=processes.device.type == "cuda",
    )
