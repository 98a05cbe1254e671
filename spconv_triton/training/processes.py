"""One process or several: what ``torchrun`` tells through the environment, and the collectives that training needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among ``world`` of them.

    Attributes:
        rank: 0 to ``world`` - 1; rank 0 prints and writes.
        world: number of processes.
        device: what this process computes on.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """``values``, on the device, summed over all processes in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the buffers of rank 0: each has seen other batches, so its batch norms differ."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"`` as a device; a plain ``"cuda"`` is that of the local rank.

    Raises:
        UserError: a device that is not one of these, or is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cpu":
        return device
    index = local_rank if device.index is None else device.index
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there is no such device; PyTorch sees {torch.cuda.device_count()}")
    return torch.device("cuda", index)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute on ``count`` threads within; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def telling_of_memory(advice: str, on_device: str) -> Iterator[None]:
    """Too little memory is told in one line, with what to try.

    Args:
        advice: as of "try ...", on a CPU.
        on_device: the same on a GPU.

    Raises:
        UserError: in the place of what PyTorch and Python raise.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory on the device; try {on_device}") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):  # which has no class on CPUs
            raise
        raise UserError(f"out of memory; try {advice}") from error


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """The processes that ``torchrun`` started (gloo on CPUs, nccl on GPUs), or this one alone.

    Raises:
        UserError: a device that is not there, or variables of the environment that are not, or are no numbers.
    """
    world = _from_environment("WORLD_SIZE", 1)
    rank, local_rank = map(_from_environment, ("RANK", "LOCAL_RANK"))
    chosen = pick_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world == 1:
        yield Processes(0, 1, chosen)
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is {world}, but {', '.join(missing)} not set: torchrun sets them all")
    _from_environment("MASTER_PORT")
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(rank, world, chosen)
    finally:
        dist.destroy_process_group()


def _from_environment(name: str, least: int = 0) -> int:
    """The number that ``torchrun`` sets; ``least`` where it has not."""
    text = os.environ.get(name, str(least))
    if not (text.isdecimal() and int(text) >= least):
        raise UserError(f"{name} in the environment must be an integer of at least {least}, got {text!r}")
    return int(text)
