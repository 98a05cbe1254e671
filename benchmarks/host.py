"""``python -m benchmarks.host``: what Python takes of a layer on the kernels, beside the device. It needs no GPU.

A driver stands for one: it has kernels compiled, takes their launches, and runs nothing; host memory stands for the
device's. So neither PyTorch's allocator of device memory is in the figures, nor what CUDA itself takes for a launch.

Launches go through Triton each time, or again to what an earlier one led to (``spconv_triton/launch/launching.py``):
both ways in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import triton
from cases import RESNET50, Case
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import Autotuner

from benchmarks.machine_code import TARGETS, CompileOnlyDriver
from benchmarks.ratios import machine, quantiles
from benchmarks.turns import round_count, turns
from spconv_triton import SPConv2d, dispatch
from spconv_triton.launch import TUNED_KERNELS, common, launching

CASES = (RESNET50[0], RESNET50[3], replace(RESNET50[1], name="resnet50-128@56/2", size=(56, 56), stride=(2, 2)))

CALLS = 50

Launched = Callable[..., None]
"""Called for every launch with its kernel's name and hash and whether it may begin early, its grid, and its arguments,
constants too."""


class Utilities:
    """What Triton asks of a driver to load a kernel and to launch it."""

    def load_binary(self, *_: Any) -> tuple[object, int, int, int, int]:
        return object(), 1, 32, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def get_device_properties(self, device: object) -> dict[str, int]:  # noqa: ARG002
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32}


class IdleDriver(CompileOnlyDriver):
    """Launches nothing, but says that it has been asked to."""

    utils = Utilities()

    def __init__(self, target: GPUTarget, launched: Launched) -> None:
        super().__init__(target, f"idle {id(launched)}")
        self.launched = launched

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:  # noqa: ARG002
        def launch(x: int, y: int, z: int, stream: Any, function: Any, *rest: Any) -> None:  # noqa: ARG001
            _packed, _metadata, _enter, _exit, *arguments = rest
            self.launched((metadata.name, metadata.hash, metadata.launch_pdl), (x, y, z), arguments)

        return launch


def always(value: Any) -> Callable[..., Any]:
    """As fast as what it stands in for: a ``Mock`` takes longer than a launch."""
    return lambda *_, **__: value


@contextlib.contextmanager
def idle_gpu(launched: Launched = lambda *_: None) -> Iterator[None]:
    """A Hopper that host memory stands for. The tuner takes no times, and the first configuration."""
    drivers = triton.runtime.driver
    previous = drivers.__dict__.get("_active")
    with contextlib.ExitStack() as stack:
        for module in (dispatch, common):
            stack.enter_context(mock.patch.object(module, "capability", always((9, 0))))
        stack.enter_context(mock.patch.object(dispatch, "_why_not_triton", always(None)))
        stack.enter_context(mock.patch.object(launching, "_is_nvidia", always(True)))
        stack.enter_context(mock.patch.object(Autotuner, "_bench", always([1.0] * 3)))
        stack.enter_context(mock.patch.object(Autotuner, "check_disk_cache", lambda *args: args[-1]()))
        for memory in (launching._compiled, *(kernel.cache for kernel in TUNED_KERNELS)):
            stack.enter_context(mock.patch.dict(memory, clear=True))
        drivers.set_active(IdleDriver(TARGETS["sm_90"], launched))
        try:
            yield
        finally:
            drivers._active = previous


def calls(case: Case) -> dict[str, Callable[[], Any]]:
    """Inference, forward with gradients, and both directions, of a layer in half precision."""
    layer, frozen = (
        SPConv2d(
            case.in_channels,
            case.out_channels,
            case.kernel_size,
            bias=False,
            backend="triton",
            dtype=torch.float16,
            alpha=case.alpha,
            **case.window,
        )
        for _ in range(2)
    )
    frozen.eval()
    x = torch.randn(case.batch, case.in_channels, *case.size, dtype=torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)
    of = x.clone().requires_grad_()
    grad = torch.randn_like(layer(of))

    def infer() -> Tensor:
        with torch.no_grad():
            return frozen(x)

    def forward() -> Tensor:
        return layer(of)

    def step() -> Any:
        return torch.autograd.grad(layer(of), (of, *layer.parameters()), grad)

    return {"inference": infer, "forward": forward, "forward+backward": step}


@contextlib.contextmanager
def through_triton() -> Iterator[None]:
    """Nothing is remembered of a launch."""
    with mock.patch.object(launching, "_is_nvidia", always(False)):
        yield


WAYS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "through Triton": through_triton,
    "again": contextlib.nullcontext,
}


def seconds(call: Callable[[], Any]) -> float:
    call()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description="Python's time of a layer")
    parser.add_argument("--rounds", type=round_count, default=15, help="rounds per row (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{machine('cpu', torch.float16)}, triton {triton.__version__}; {options.rounds} rounds;", end=" ")
    print(f"{datetime.datetime.now(datetime.timezone.utc).date()}\n")
    print("| layer | direction | launches | through Triton us | again us | x |\n|---|---|---|---|---|---|")
    names: list[str] = []
    with idle_gpu(lambda name, *_: names.append(name)):
        for case in (replace(case, batch=1) for case in CASES):
            for direction, call in calls(case).items():
                call()
                names.clear()
                call()
                launches = len(names)
                times: dict[str, list[float]] = {way: [] for way in WAYS}
                for order in turns(list(WAYS), options.rounds):
                    for way in order:
                        with WAYS[way]():
                            times[way].append(1e6 * seconds(call))
                slow, fast = (statistics.median(times[way]) for way in WAYS)
                low, middle, high = quantiles([a / b for a, b in zip(*times.values(), strict=True)])
                print(f"| {case.name} | {direction} | {launches} | {slow:.0f} | {fast:.0f} |", end="")
                print(f" {middle:.2f} ({low:.2f} to {high:.2f}) |", flush=True)


if __name__ == "__main__":
    main()
