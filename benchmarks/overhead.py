"""``python -m benchmarks.overhead``: what importing the package adds to ``import torch``, and what a call of the layer
costs beside its kernels, on a CPU.

An import is timed in processes of their own. The kernels of a call are recorded once, as PyTorch's dispatcher sees
them, and played back from a flat list, views left out: that is their own time. Call and playback take turns, and the
difference is taken within a round. Maps are tiny, so that kernels take little and vary little.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ratios import machine, quantiles
from benchmarks.turns import round_count, turns
from spconv_triton import SPConv2d

CASES = {
    "merged weights": (16, 16, 12),
    "merged weights, wider": (32, 32, 18),
    "folded weights": (128, 128, 7),
}
"""Input channels, output channels, height and width of the map: prepared weights in the forms of small layers."""

CALLS = 200

IMPORT = "import time, torch; start = time.perf_counter(); import spconv_triton; print(time.perf_counter() - start)"


def import_seconds() -> float:
    """What the import takes where torch is imported already, in a fresh process."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    return float(done.stdout)


class Recording(TorchDispatchMode):
    """The kernels that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = functools.partial(func, *args, **(kwargs or {}))
        result = kernel()
        if not _is_view(func, args, result):
            self.kernels.append(kernel)
        return result


def _is_view(func: Any, args: tuple[Any, ...], result: Any) -> bool:
    """Whether ``result`` lies where an argument does, and nothing was written there."""
    if func._schema.is_mutable or not isinstance(result, Tensor):
        return False
    tensors = (a for a in args if isinstance(a, Tensor) and a.layout is torch.strided)  # oneDNN's have no storage
    return any(a.untyped_storage()._cdata == result.untyped_storage()._cdata for a in tensors)


def record(call: Callable[[], Any]) -> list[Callable[[], Any]]:
    call()  # what the layer remembers from then on is not done again
    # The path takes other kernels where a mode looks on, and is told that none does.
    with Recording() as recording, mock.patch.object(torch._C, "_len_torch_dispatch_stack", return_value=0):
        call()
    return recording.kernels


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def measure(call: Callable[[], Any], rounds: int) -> tuple[list[float], list[float], int]:
    """Seconds of a call and of its kernels, by round, and how many kernels there are."""
    kernels = record(call)

    def play() -> None:
        for kernel in kernels:
            kernel()

    for one in (call, play):
        seconds(one)  # a warm-up
    called: list[float] = []
    played: list[float] = []
    for order in turns(((called, call), (played, play)), rounds):
        for column, one in order:
            column.append(seconds(one))
    return called, played, len(kernels)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description="calls beside their kernels")
    parser.add_argument("--rounds", type=round_count, default=25, help="rounds per row (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    today = datetime.datetime.now(datetime.timezone.utc).date()
    print(f"{machine('cpu', torch.float32)}; {options.rounds} rounds; {today}\n")
    low, middle, high = quantiles([1e3 * import_seconds() for _ in range(options.rounds)])
    print(f"`import spconv_triton` after `import torch`: {middle:.0f} ms ({low:.0f} to {high:.0f})\n")
    print("| layer | call us | kernels us | kernels | beside them us |\n|---|---|---|---|---|")
    for name, (inputs, outputs, size) in CASES.items():
        layer = SPConv2d(inputs, outputs, 3, padding=1).eval()
        x = torch.randn(1, inputs, size, size).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            called, played, kernels = measure(functools.partial(_call, layer, x), options.rounds)
        low, middle, high = quantiles([1e6 * (c - p) for c, p in zip(called, played, strict=True)])
        cells = (*(f"{1e6 * statistics.median(t):.0f}" for t in (called, played)), str(kernels))
        print(f"| {name}: {inputs} to {outputs} at {size} x {size} |", " | ".join(cells), end="")
        print(f" | {middle:.0f} ({low:.0f} to {high:.0f}) |", flush=True)


def _call(layer: SPConv2d, x: Tensor) -> Tensor:
    return layer(x)


if __name__ == "__main__":
    main()
