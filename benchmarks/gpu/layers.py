"""Layers timed against ``nn.Conv2d``: a batch at a time, one image at a time, and in memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch._functorch.config as functorch_config
from cases import kept_bytes
from triton.runtime import Autotuner

from benchmarks.competitors import LAYOUTS, Contestant, Trial
from benchmarks.gpu import plan
from benchmarks.gpu.device import Call, Device, device_of, latency
from benchmarks.gpu.record import Record
from benchmarks.peers.catalogue import COMPILED
from benchmarks.ratios import quantiles
from benchmarks.turns import turns

ROUNDS = 40
REHEARSED_ROUNDS = 2

Sampler = Callable[[Sequence[Call]], list[float]]
"""Seconds of one call of each, in turn."""


def layers(record: Record) -> None:
    """Forward, backward and training step: what the device takes, with the host always ahead of it."""
    _time(record, plan.layers(rehearsal=record.rehearsal))


def variants(record: Record) -> None:
    """The same of the large batch in the other ways to run a layer."""
    _time(record, plan.variants(rehearsal=record.rehearsal))


def others(record: Record) -> None:
    """The same of other networks' layers and in other dtypes."""
    _time(record, plan.others(rehearsal=record.rehearsal))


def _time(record: Record, entries: Sequence[plan.Entry]) -> None:
    device = device_of(record)
    with tuning(record):
        for entry in entries:
            field = contestants(record, device, entry)
            for direction in ("forward", "backward", "step"):
                with record.check(f"{label(entry)}, {direction}: timed", device.synchronize):
                    calls = fastest(field, direction, device.sample)
                    report(record, keys(entry), direction, "device", calls, device.sample)


def single(record: Record) -> None:
    """One image: until its result is there, called from Python and as a CUDA graph, and what the device takes of it."""
    _time_single(record, plan.single(rehearsal=record.rehearsal))


def single_variants(record: Record) -> None:
    """The same in the other ways to run a layer."""
    _time_single(record, plan.single_variants(rehearsal=record.rehearsal))


def _time_single(record: Record, entries: Sequence[plan.Entry]) -> None:
    device = device_of(record)
    wait = waiting(device)
    with tuning(record):
        for entry in entries:
            field = contestants(record, device, entry)
            for direction in ("forward", "forward+backward"):
                with record.check(f"{label(entry)}, {direction}: timed", device.synchronize):
                    calls = fastest(field, direction, wait)
                    report(record, keys(entry), direction, "called", calls, wait)
                    # What is compiled launches much the same; its own way to CUDA graphs is mode="reduce-overhead".
                    replays = captured(device, {n: call for n, call in calls.items() if not n.endswith(COMPILED)})
                    if not replays:
                        record.needs_gpu("replays of CUDA graphs")
                        continue
                    report(record, keys(entry), direction, "graph", replays, wait)
                    report(record, keys(entry), direction, "device", replays, device.sample)


def waiting(device: Device) -> Sampler:
    """Samples the time until a result is there."""
    return lambda calls: [latency(device, call) for call in calls]


def captured(device: Device, calls: dict[str, Call]) -> dict[str, Call]:
    """Replays, by name; none in a rehearsal."""
    graphs = {name: device.capture(call) for name, call in calls.items()}
    return {name: found[0] for name, found in graphs.items() if found is not None}


def memory(record: Record) -> None:
    """What a training step of one layer allocates at most, and what its forward keeps for the backward."""
    device = device_of(record)
    for entry in plan.layers(rehearsal=record.rehearsal):
        if entry.case.batch == plan.MIDDLE:
            continue  # in proportion
        few = entry._replace(names=(*plan.FEW, "separate"))
        for contestant in contestants(record, device, few):
            if contestant.layout != "channels_last":
                continue
            x = contestant.x.detach().requires_grad_()
            kept = kept_bytes(lambda x=x, module=contestant.module: module(x))
            step = contestant.call("step")
            step()  # the optimizer's state is there from now on
            peak = device.peak_bytes(step)
            record.row(
                "memory",
                **keys(entry),
                competitor=contestant.name,
                x_mb=x.nbytes / 1e6,
                kept_mb=kept / 1e6,
                peak_mb=None if peak is None else peak / 1e6,
            )


def label(entry: plan.Entry) -> str:
    return f"{entry.case}, N = {entry.case.batch}, {str(entry.dtype).removeprefix('torch.')}"


def keys(entry: plan.Entry) -> dict[str, Any]:
    """What the rows of one layer have in common, and the model's too."""
    return {"layer": entry.case.name, "batch": entry.case.batch, "dtype": str(entry.dtype).removeprefix("torch.")}


def contestants(record: Record, device: Device, entry: plan.Entry) -> list[Contestant]:
    """Those whose results are right; PyTorch's own in either memory format, ours in channels_last.

    A rehearsal compiles without Inductor, whose code of a CPU takes longer to build than all that it rehearses.
    """
    torch._dynamo.reset()
    compile = functools.partial(torch.compile, backend="aot_eager") if record.rehearsal else torch.compile
    trials = {dense: Trial(entry.case, dense=dense, device=device.name, dtype=entry.dtype) for dense in (True, False)}
    found = []
    for name in entry.names:
        for layout in LAYOUTS if name in ("conv2d", "reference") else ("channels_last",):
            checked = record.check(f"{label(entry)}, {name}, {layout}", device.synchronize)
            with checked, mock.patch.object(torch, "compile", compile):
                found.append(trials[name == "conv2d"].contestant(name, layout))
    return found


def fastest(field: Sequence[Contestant], direction: str, sampler: Sampler) -> dict[str, Call]:
    """By name; where there are two, the one in the faster memory format."""
    calls: dict[str, list[Call]] = {}
    for contestant in field:
        calls.setdefault(contestant.name, []).append(contestant.call(direction))
    return {name: _fastest(of, sampler) for name, of in calls.items()}


def _fastest(calls: Sequence[Call], sampler: Sampler) -> Call:
    """By the fastest of a few samples, taken in turns."""
    if len(calls) == 1:
        return calls[0]
    best = [min(times) for times in zip(*(sampler(calls) for _ in range(5)), strict=True)]
    return calls[best.index(min(best))]


def report(
    record: Record, keys: dict[str, Any], direction: str, what: str, calls: dict[str, Call], sampler: Sampler
) -> None:
    """Times in interleaved rounds, and in each round how many times faster than the first: 20, 50 and 80 %.

    Args:
        keys: what the rows begin with.
        what: the time that is meant: ``"device"``, ``"called"`` (until the result is there) or ``"graph"`` (likewise).
        calls: by name; the first is what the others are compared with.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    if not record.rehearsal:
        sampler([calls[name] for name in names])  # the first call of each is another thing
    for order in turns(names, REHEARSED_ROUNDS if record.rehearsal else ROUNDS):
        for name, took in zip(order, sampler([calls[name] for name in order]), strict=True):
            seconds[name].append(took)
    yardstick = names[0]
    for name, own in seconds.items():
        speed = [y / s for y, s in zip(seconds[yardstick], own, strict=True)]
        record.row(
            "times",
            **keys,
            direction=direction,
            what=what,
            competitor=name,
            ms=[1e3 * q for q in quantiles(own)],
            yardstick=yardstick,
            speed=list(quantiles(speed)),
        )


@contextlib.contextmanager
def tuning(record: Record) -> Iterator[None]:
    """Writes down what Triton's tuner chooses meanwhile, and how long it takes; Inductor has a tuner of its own."""
    original = Autotuner.run
    chosen: list[dict[str, Any]] = []

    def run(tuner: Autotuner, *args: Any, **kwargs: Any) -> Any:
        known = len(tuner.cache)
        result = original(tuner, *args, **kwargs)
        if len(tuner.cache) > known:
            key, config = list(tuner.cache.items())[-1]
            times = {str(c): _median(t) for c, t in getattr(tuner, "configs_timings", {}).items()}
            spent = getattr(tuner, "bench_time", 0.0)
            row = {"kernel": tuner.base_fn.__name__, "key": " ".join(map(str, key)), "chosen": str(config)}
            chosen.append({**row, "ms": times.get(str(config)), "of": len(times), "seconds": spent})
        return result

    # A backward is timed over and over on one graph, whose memory Inductor would else give away.
    with mock.patch.object(Autotuner, "run", run), functorch_config.patch(donated_buffer=False):
        try:
            yield
        finally:
            for row in chosen:
                record.row("tuning", **row)


def _median(times: Any) -> float:
    return float(times[0] if isinstance(times, (list, tuple)) else times)
