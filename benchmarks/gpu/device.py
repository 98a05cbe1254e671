"""The device that the kit runs on: a GPU, or in a rehearsal this machine's processor, which times nothing worth having.

Only what is here differs between the two; the sections do not ask which one they have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from benchmarks.gpu.record import Record

FLUSH_BYTES = 2 * 2**30
"""Written before each call that is timed: more than any L2 cache holds. It takes an H200 half a millisecond."""

LEAD = 8
"""How many times. Meanwhile Python launches what is timed next, which for a training step takes it two milliseconds; so
the times are the GPU's alone, and of a cold cache."""

READ_BYTES = 2**28
"""Read after that: else what is timed would wait until what was written has left the cache, for which an H200 takes as
long as for reading as much."""

Call = Callable[[], Any]


class Device(Protocol):
    name: str

    def synchronize(self) -> None:
        """Wait for what has been launched; raises if any of it went wrong."""

    def sample(self, calls: Sequence[Call], lead: int = LEAD) -> list[float]:
        """Seconds of one call of each, in turn; ``lead`` as :data:`LEAD`."""

    def capture(self, call: Call) -> tuple[Call, Any] | None:
        """A replay of ``call`` as a CUDA graph, and where it leaves its result; None where there are no such graphs."""

    def peak_bytes(self, call: Call) -> int | None:
        """The most memory that ``call`` allocates at a time; None where that is not counted."""


class Gpu:
    name = "cuda"

    def __init__(self) -> None:
        torch.backends.cudnn.benchmark = True
        total = torch.cuda.get_device_properties(0).total_memory
        self._flush = torch.empty(min(FLUSH_BYTES, total // 16), dtype=torch.int8, device="cuda")
        self._read = self._flush[:READ_BYTES].view(4096, -1).view(torch.float32)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def sample(self, calls: Sequence[Call], lead: int = LEAD) -> list[float]:
        events = []
        for call in calls:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(lead):
                self._flush.zero_()
            self._read.sum(1)
            start.record()
            call()
            stop.record()
            events.append((start, stop))
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1e3 for start, stop in events]

    def capture(self, call: Call) -> tuple[Call, Any]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return graph.replay, result

    def peak_bytes(self, call: Call) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


class Rehearsal:
    name = "cpu"

    def synchronize(self) -> None:
        pass

    def sample(self, calls: Sequence[Call], lead: int = LEAD) -> list[float]:  # noqa: ARG002
        return [self._seconds(call) for call in calls]

    def capture(self, call: Call) -> None:
        call()

    def peak_bytes(self, call: Call) -> None:
        call()

    def _seconds(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def device_of(record: Record) -> Device:
    """The GPU, or what stands for it in a rehearsal."""
    return Rehearsal() if record.rehearsal else Gpu()


def latency(device: Device, call: Call) -> float:
    """Seconds until the result of one call is there, on a device that waits for nothing else."""
    device.synchronize()
    start = time.perf_counter()
    call()
    device.synchronize()
    return time.perf_counter() - start
