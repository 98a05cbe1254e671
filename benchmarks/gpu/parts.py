"""Where a layer's time goes: what the device takes for each kernel of a call, by its profiler."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
from torch.autograd import DeviceType

from benchmarks.gpu import plan
from benchmarks.gpu.device import Call, Device, device_of
from benchmarks.gpu.layers import contestants, fastest, keys, label, tuning
from benchmarks.gpu.record import Record

CALLS = 15

FLUSH_NS = 100_000
"""The write that empties the L2 cache takes longer than that."""

DIRECTIONS = ("forward", "backward")


def parts(record: Record) -> None:
    """Of the compared layers, ours and ``nn.Conv2d``'s kernels in the order of their launches."""
    device = device_of(record)
    with tuning(record):
        for entry in plan.parts(rehearsal=record.rehearsal):
            field = contestants(record, device, entry)
            for direction in DIRECTIONS:
                for name, call in fastest(field, direction, device.sample).items():
                    with record.check(f"{label(entry)}, {direction}, {name}: profiled", device.synchronize):
                        kernels = list(profiled(device, call))
                        if not kernels:
                            record.needs_gpu("the time of each kernel")
                        for number, (kernel, seconds, at) in enumerate(kernels):
                            record.row(
                                "parts",
                                **keys(entry),
                                direction=direction,
                                competitor=name,
                                number=number,
                                kernel=kernel,
                                us=1e6 * seconds,
                                at=1e6 * at,
                            )


def profiled(device: Device, call: Call) -> Iterator[tuple[str, float, float]]:
    """The kernels that one call launches, from a cold cache: medians of each one's seconds, and of when it begins, in
    seconds since the first of them began. One that need not wait for the one ahead begins before that ends."""
    device.sample([call])
    activities = [torch.profiler.ProfilerActivity.CUDA] if device.name == "cuda" else []
    if not activities:
        return
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(CALLS):
            device.sample([call])
    # Not profile.events(), which leaves out what no operator of PyTorch's launches.
    events = [e for e in profile.profiler.kineto_results.events() if e.device_type() == DeviceType.CUDA]
    events.sort(key=lambda event: event.start_ns())
    names = [event.name() for event in events]
    # Before each call come the writes that empty the L2 cache, the first events of all, and a read.
    starts = [i for i, name in enumerate(names) if name == names[0] and events[i].duration_ns() > FLUSH_NS]
    calls = [events[a + 2 : b] for a, b in zip(starts, [*starts[1:], len(events)], strict=True) if b > a + 2]
    length = statistics.mode(map(len, calls))
    calls = [found for found in calls if len(found) == length]
    begins = [found[0].start_ns() for found in calls]
    for same in zip(*calls, strict=True):
        at = statistics.median(event.start_ns() - begin for event, begin in zip(same, begins, strict=True))
        yield same[0].name(), statistics.median(event.duration_ns() for event in same) / 1e9, at / 1e9
