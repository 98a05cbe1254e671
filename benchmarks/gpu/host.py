"""What a call takes on the host, and what of it: for one image a GPU waits for Python more than it computes."""

from __future__ import annotations

import cProfile
import statistics
import time
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from benchmarks.gpu import plan
from benchmarks.gpu.device import Call, Device, device_of
from benchmarks.gpu.layers import contestants, fastest, keys, label, tuning, waiting
from benchmarks.gpu.record import Record

CALLS = 40
REHEARSED_CALLS = 1

FUNCTIONS = 20
"""How many of a call are told."""

DIRECTIONS = ("forward", "forward+backward")


def host(record: Record) -> None:
    """Until a call returns, of ours and ``nn.Conv2d``, and the functions that it spends its time in."""
    device, calls = device_of(record), REHEARSED_CALLS if record.rehearsal else CALLS
    # Else the backward is in another thread, of which a profile sees nothing.
    with tuning(record), torch.autograd.set_multithreading_enabled(False):
        for entry in plan.host(rehearsal=record.rehearsal):
            field = contestants(record, device, entry)
            for direction in DIRECTIONS:
                for name, call in fastest(field, direction, waiting(device)).items():
                    with record.check(f"{label(entry)}, {direction}, {name}: on the host", device.synchronize):
                        record.row(
                            "host",
                            **keys(entry),
                            direction=direction,
                            competitor=name,
                            us=1e6 * until_it_returns(device, call, calls),
                            functions=own_times(device, call, calls)[:FUNCTIONS],
                        )


def until_it_returns(device: Device, call: Call, calls: int) -> float:
    """Median of seconds; the device has nothing to do before, and is not waited for."""
    seconds = []
    for _ in range(calls):
        device.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def own_times(device: Device, call: Call, calls: int) -> list[dict[str, Any]]:
    """What each function takes of a call apart from those that it calls, the longest first.

    The profiler takes its own share of every function, so they add up to more than the call.
    """
    profile = cProfile.Profile()
    for _ in range(calls):
        device.synchronize()
        profile.enable()
        call()
        profile.disable()
    found = sorted(profile.getstats(), key=lambda entry: entry.inlinetime, reverse=True)
    return [
        {"function": _name(entry.code), "calls": entry.callcount / calls, "us": 1e6 * entry.inlinetime / calls}
        for entry in found
    ]


def _name(code: CodeType | str) -> str:
    """As short as it can be told: built-in ones by name, others with their file."""
    if isinstance(code, str):
        return code.strip("<>").removeprefix("built-in method ").removeprefix("method ")
    return f"{Path(code.co_filename).name}:{code.co_name}"
