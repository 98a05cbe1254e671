"""``python -m benchmarks.products``: how fast a layer would be on this CPU if it were its products alone.

Each in the way that takes the least time here: the group-wise convolution of x3, which lies by itself already, and one
matrix product with all point-wise weights, the same for every sample; in a step their gradients as well, of the whole
batch in one call. There is no gate, no pass over a map and no sum of two, nothing is recomputed, and what a product
writes into is there. What is left between that and *MACs x* is the libraries': their convolutions do fewer
multiply-accumulates a second where groups are narrow. What is left between the layer and that is ours.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from cases import RESNET50, Case
from torch import Tensor

from benchmarks.competitors import DEVICE, DIRECTIONS, Competitor, build, count_macs, with_batch
from benchmarks.ratios import machine, quantiles, seconds_in_turns
from benchmarks.turns import fastest, round_count
from spconv_triton.training.cli import count

Call = Callable[[], Sequence[Tensor]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description="What a layer cannot do without")
    parser.add_argument("--rounds", type=round_count, default=15, help="rounds per row (default: %(default)s)")
    parser.add_argument("--batches", type=count, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads(), help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if DEVICE != "cpu":
        parser.error("these are a CPU's products: hide the GPU (CUDA_VISIBLE_DEVICES=)")
    torch.set_num_threads(options.threads)
    print(f"{machine()}; {options.rounds} rounds; {datetime.datetime.now(datetime.timezone.utc).date()}\n")
    print("| layer | N | direction | conv2d GMAC/s | products GMAC/s | products x | native x | MACs x |")
    print("|---|---|---|---|---|---|---|---|")
    for direction in DIRECTIONS:
        for batch in options.batches:
            rows = [_measure(with_batch(case, batch), direction, options.rounds) for case in RESNET50]
            for case, (rates, ratios) in zip(RESNET50, rows, strict=True):
                cells = [f"{rate:.0f}" for rate in rates]
                cells += ["{1:.2f} ({0:.2f} to {2:.2f})".format(*quantiles(ratio)) for ratio in ratios]
                row = [case.name, str(batch), direction, *cells, _macs(case, direction)]
                print("|", " | ".join(row), "|", flush=True)
            means = (statistics.geometric_mean(statistics.median(row[1][i]) for row in rows) for i in range(2))
            print(f"| geometric mean | {batch} | {direction} | | |", " | ".join(f"{mean:.2f}" for mean in means), "| |")


def _macs(case: Case, direction: str) -> str:
    return f"{count_macs(case, 'conv2d', direction) / count_macs(case, 'native', direction):.2f}"


def _measure(case: Case, direction: str, rounds: int) -> tuple[list[float], list[list[float]]]:
    """Billions of multiply-accumulates a second of nn.Conv2d and of the products, and the speeds of the products and of
    the layer in each round as multiples of nn.Conv2d's."""
    macs = count_macs(case, "native", direction)
    call = functools.partial(run, calls(case, direction))
    field = [build(case, "conv2d", direction), Competitor("products", call, "channels_last", macs)]
    field.append(build(case, "native", direction))
    dense, *others = seconds_in_turns(field, rounds).values()
    rates = [one.macs / 1e9 / statistics.median(own) for one, own in zip(field, (dense, others[0]), strict=False)]
    return rates, [[d / s for d, s in zip(dense, own, strict=True)] for own in others]


def run(products: Sequence[Call]) -> list[Tensor]:
    """All that they return."""
    with torch.no_grad():
        return [result for product in products for result in product()]


def calls(case: Case, direction: str) -> list[Call]:
    """The products of a layer at stride 1, in float32."""
    batch, inputs, outputs = case.batch, case.in_channels, case.out_channels
    window = (case.stride, case.padding, case.dilation)

    def maps(channels: int, size: Sequence[int]) -> Tensor:
        return torch.randn(batch, channels, *size).contiguous(memory_format=torch.channels_last)

    def rows(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(0, 2)

    x3, z, g = maps(case.representative, case.size), rows(maps(inputs, case.size)), maps(outputs, case.output_size())
    gwc = torch.randn(outputs, case.representative // case.groups, *case.kernel_size)
    gwc = gwc.contiguous(memory_format=torch.channels_last)
    pointwise = torch.randn(outputs, inputs)
    found: list[Call] = [
        lambda: [F.conv2d(x3, gwc, None, *window, case.groups)],
        _product(z, pointwise.t()),
    ]
    if direction != DIRECTIONS[0]:
        backward = functools.partial(torch.ops.aten.convolution_backward, g, x3, gwc, None, *window)
        found += [
            lambda: backward(False, (0, 0), case.groups, (True, True, False))[:2],
            _product(rows(g), pointwise),
            _product(rows(g).t(), z),
        ]
    return found


def _product(first: Tensor, second: Tensor) -> Call:
    """ATen's or, where it takes less time, oneDNN's, which alone makes memory for its result."""
    out = first.new_empty(first.shape[0], second.shape[1])
    of_onednn = torch.ops.mkldnn._linear_pointwise.default
    ways: dict[str, Call] = {
        "aten": lambda: [torch.mm(first, second, out=out)],
        "onednn": lambda: [of_onednn(first, second.t(), None, "none", [], "")],
    }
    with torch.no_grad():
        return ways[fastest(ways)]


if __name__ == "__main__":
    main()
