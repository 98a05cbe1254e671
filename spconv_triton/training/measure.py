"""What a network costs: parameters, multiply-accumulates, time, and bytes kept for backward."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kept import kept_bytes
from ..network_summary import summarize


def count_parameters(network: nn.Module) -> int:
    """Learnable numbers."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-accumulates of the convolutions and linear layers of one forward pass; nothing else is counted.

    Args:
        shape: of the input, [N, C, H, W].
    """
    return summarize(network, tuple(shape)).total.macs_after


def count_saved_bytes(network: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes that a training forward pass keeps for its backward, each storage once.

    What lives longer than the pass is not counted: parameters, buffers and the input.
    """
    subject = copy.deepcopy(network).train()
    lasting = (*subject.parameters(), *subject.buffers(), images, labels)
    return kept_bytes(lambda: F.cross_entropy(subject(images), labels), lasting)


def forward_pass(network: nn.Module, images: Tensor) -> Callable[[], None]:
    """An inference pass to time."""
    network.eval()

    def run() -> None:
        with torch.inference_mode():
            network(images)

    return run


def training_step(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A training step (forward, backward, SGD update) of a copy of the network, to time: its learning rate is 0."""
    subject = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(subject.parameters(), lr=0.0, momentum=0.9)

    def run() -> None:
        loss = F.cross_entropy(subject(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return run


def interleaved(
    subjects: Sequence[Callable[[], None]], device: torch.device, *, rounds: int, repeats: int = 1, warm_up: int = 3
) -> list[list[float]]:
    """Seconds per call of each subject, one list of ``rounds`` values each.

    The subjects take turns, so that what else the machine does meets all of them; compare them round by round.

    Args:
        rounds: turns of each subject.
        repeats: calls in a turn.
        warm_up: untimed calls of each before.
    """
    for subject in subjects:
        for _ in range(warm_up):
            subject()
    seconds: list[list[float]] = [[] for _ in subjects]
    for _ in range(rounds):
        for subject, times in zip(subjects, seconds, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats):
                subject()
            _synchronize(device)
            times.append((time.perf_counter() - start) / repeats)
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over the rounds of numerator / denominator."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
