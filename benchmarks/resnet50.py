"""``python -m benchmarks.resnet50``: torchvision's ResNet-50, converted and fused, against itself, as a Markdown table.

Inference on a CPU in float32. The vanilla network runs in the faster of its two memory formats, the others in
channels_last. They take turns within each round, as in :mod:`benchmarks.ratios`, and a speed is the median of the
rounds' ratios with their 20 % and 80 % quantiles. *plain norms* stands for ``fuse(model, plain_norms=True)``, which
folds the norms behind plain convolutions too: into the vanilla network's as well, which has no others.

No network is timed before its logits are within the error budget of float64.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import statistics
import time
from collections.abc import Sequence

import torch
import torchvision
from cases import kept_bytes
from torch import Tensor, nn

from benchmarks.allocator import settle
from benchmarks.competitors import LAYOUTS
from benchmarks.logits import calibrated, check, right
from benchmarks.ratios import machine, quantiles
from benchmarks.turns import fastest, round_count, turns
from spconv_triton import convert, fuse
from spconv_triton.training.cli import count

VANILLA = "vanilla"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resnet50", description="SPConv in ResNet-50, on a CPU")
    parser.add_argument("--rounds", type=round_count, default=15, help="rounds (default: %(default)s)")
    parser.add_argument("--batch", type=count, default=8, help="images (default: %(default)s)")
    parser.add_argument("--size", type=count, default=224, help="their height and width (default: %(default)s)")
    parser.add_argument("--alpha", type=float, default=0.5, help="share of representative channels (default: 0.5)")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="time the compiled networks too (minutes)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size)
    vanilla = calibrated(torchvision.models.resnet50(weights=None), images)
    split = convert(copy.deepcopy(vanilla), options.alpha).to(memory_format=torch.channels_last)
    split = calibrated(split, images)
    today = datetime.datetime.now(datetime.timezone.utc).date()
    print(f"{machine('cpu', torch.float32)}; batch {options.batch}, {options.size} x {options.size}, "
          f"alpha {options.alpha:g}, {options.rounds} rounds; {today}\n")  # fmt: skip
    for line in speeds(vanilla, split, images, options.rounds, compiled=options.compile):
        print(line, flush=True)
    dense, sparse = (training_bytes(model, images) for model in (vanilla, split))
    print("\nkept for the backward of a training step, beside the weights: "
          f"{dense / 1e6:.0f} MB vanilla, {sparse / 1e6:.0f} MB SPConv, {sparse / dense:.3f} x")  # fmt: skip


def speeds(vanilla: nn.Module, split: nn.Module, images: Tensor, rounds: int, *, compiled: bool) -> list[str]:
    """The rows of the table."""
    networks = {
        VANILLA: vanilla,
        "vanilla, plain norms": fuse(vanilla, plain_norms=True),
        "SPConv": split,
        "SPConv, fused": fuse(split),
        "SPConv, fused, plain norms": fuse(split, plain_norms=True),
    }
    if compiled:
        networks |= {f"{name}, compiled": torch.compile(model) for name, model in networks.items()}
    settle()
    with torch.inference_mode():
        layout = faster_layout(vanilla, images)
        formats = {name: LAYOUTS[layout if name.startswith(VANILLA) else "channels_last"] for name in networks}
        expected = {True: right(vanilla, images), False: right(split, images)}
        runners = {}
        for name, model in networks.items():
            runners[name] = (model.to(memory_format=formats[name]), images.contiguous(memory_format=formats[name]))
            # This first call compiles, and builds what oneDNN keeps.
            check(name, *runners[name], expected[name.startswith(VANILLA)])
            seconds(*runners[name])
        taken: dict[str, list[float]] = {name: [] for name in runners}
        for order in turns(list(runners), rounds):
            for name in order:
                taken[name].append(seconds(*runners[name]))
    rows = ["| network | ms | speed, vanilla = 1 |", "|---|---:|---:|"]
    for name, own in taken.items():
        p20, p50, p80 = quantiles([v / s for v, s in zip(taken[VANILLA], own, strict=True)])
        label = f"{name} ({layout})" if name == VANILLA else name
        rows.append(f"| {label} | {1e3 * statistics.median(own):.0f} | {p50:.2f} ({p20:.2f} to {p80:.2f}) |")
    return rows


def seconds(model: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


def faster_layout(model: nn.Module, images: Tensor) -> str:
    """By the fastest of a few calls, taken in turns."""
    return fastest(
        {
            name: functools.partial(
                copy.deepcopy(model).to(memory_format=layout), images.contiguous(memory_format=layout)
            )
            for name, layout in LAYOUTS.items()
        },
        rounds=4,
    )


def training_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps in a training step beside the parameters, each storage once; of the whole batch."""
    images = images.contiguous(memory_format=torch.channels_last)
    model = copy.deepcopy(model).to(memory_format=torch.channels_last).train()
    return kept_bytes(lambda: model(images), model.parameters())


if __name__ == "__main__":
    main()
