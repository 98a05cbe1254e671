"""The tile that a layer gets, and those that it might have got: whether the choice is the fastest."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from cases import Case
from torch import Tensor

from benchmarks.gpu import plan
from benchmarks.gpu.checks import has_descriptors
from benchmarks.gpu.device import Call, Device, device_of
from benchmarks.gpu.layers import keys, label
from benchmarks.gpu.record import Record
from benchmarks.turns import turns
from spconv_triton.launch import descriptor, gradients_descriptor

ROUNDS = 9
TOGETHER = 12
"""Tiles that take turns with the chosen one, which is compared within each round."""

Tile = Any


class Kernel(NamedTuple):
    """A kernel whose tile is chosen by the launch code.

    Attributes:
        call: launches it once.
        chosen: its tile, by the launch code.
        others: tiles to compare that with.
        with_tile: the context in which ``call`` takes a tile.
    """

    name: str
    call: Callable[[], Any]
    chosen: Tile
    others: Sequence[Tile]
    with_tile: Callable[[Tile], Any]


def tiles(record: Record) -> None:
    """Every tile that computes the same as the chosen one, with its time beside the chosen one's."""
    device = device_of(record)
    if not has_descriptors(device):
        record.skip("no tensor maps on this device, and the tuner chooses the other kernels' blocks")
        return
    for entry in plan.tiles(rehearsal=record.rehearsal):
        for kernel in kernels(entry.case, entry.dtype, device.name):
            _compare(record, device, entry, kernel)


def kernels(case: Case, dtype: torch.dtype, device: str) -> Iterator[Kernel]:
    """Those of a layer over descriptors."""

    def fresh(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        if device == "meta":
            return torch.empty(shape, dtype=kind, device=device)
        return torch.randn(shape, device=device).to(kind)

    def image(channels: int, height: int, width: int) -> Tensor:
        return fresh(case.batch, height, width, channels).permute(0, 3, 1, 2)

    stride = case.stride[0]
    output = case.output_size()
    representative, outputs = case.representative, case.out_channels
    window = (case.in_channels, representative, outputs, case.groups)
    x, grad = image(case.in_channels, *case.size), image(outputs, *output)
    ratio, scale, offset = (fresh(case.batch, outputs, kind=torch.float32) for _ in range(3))
    packing = descriptor.packing(*window)
    assert packing is not None
    packed = fresh(outputs, packing.columns)
    size = (case.batch, *output, outputs)

    def forward() -> Tensor:
        return descriptor.convolve(x, packed, ratio, scale, offset, None, representative, case.groups, stride, "none")

    yield Kernel(
        "onepass",
        forward,
        descriptor.best_tile(packing, case.groups, stride, size),
        list(plan.forward_tiles(packing, outputs, case.groups)),
        lambda tile: mock.patch.object(descriptor, "best_tile", return_value=tile),
    )
    backward = gradients_descriptor.packing(*window)
    assert backward is not None
    weights = fresh(backward.rows, case.in_channels)
    gate = fresh(2, case.batch, outputs, kind=torch.float32)
    constant = fresh(9, case.batch, case.in_channels, kind=torch.float32)
    shape = (case.batch, case.in_channels, *output)

    def input_grad() -> Tensor:
        return gradients_descriptor.input_grad(grad, weights, gate, constant, representative, case.groups, stride)

    yield Kernel(
        "input gradient",
        input_grad,
        gradients_descriptor.input_tile(backward, shape, representative, case.groups, stride),
        list(plan.input_tiles(backward, case)),
        lambda tile: mock.patch.object(gradients_descriptor, "input_tile", return_value=tile),
    )

    gwc = fresh(outputs, 3, 3, representative // case.groups).permute(0, 3, 1, 2)
    pwc, redundant = fresh(outputs, representative, 1, 1), fresh(outputs, case.in_channels - representative, 1, 1)

    pooled = None if stride == 1 else image(case.in_channels, *output)

    def weight_grad() -> tuple[Tensor, Tensor]:
        return gradients_descriptor.weight_grad(grad, x, pooled, gwc, pwc, redundant, ratio, case.groups, stride)

    yield Kernel(
        "weight gradient",
        weight_grad,
        gradients_descriptor.weight_tile(backward, case.in_channels, representative, outputs, case.groups),
        list(plan.weight_tiles(backward, case)),
        lambda tile: mock.patch.object(gradients_descriptor, "weight_tile", return_value=tile),
    )


def _compare(record: Record, device: Device, entry: plan.Entry, kernel: Kernel) -> None:
    others = [tile for tile in kernel.others if tile != kernel.chosen]
    name = f"{label(entry)}, {kernel.name}"
    expected = _comparable(_on(kernel, kernel.chosen)())
    works: dict[Tile, Call] = {kernel.chosen: _on(kernel, kernel.chosen)}
    for tile in others:
        call = _on(kernel, tile)
        with record.check(f"{name}, {tile}", device.synchronize):
            try:
                found = _comparable(call())
            except Exception as error:
                if "out of resource" not in str(error):
                    raise
                record.row(
                    "tiles", **keys(entry), kernel=kernel.name, tile=_text(tile), chosen=False, us=None, speed=None
                )
                continue
            worst = (found - expected).abs().max() / expected.abs().max()
            assert worst < 1e-2, f"differs from the chosen tile's by {worst:.2g} of the largest"
            works[tile] = call
    rest = [tile for tile in works if tile != kernel.chosen]
    rounds = 1 if record.rehearsal else ROUNDS
    for first in range(0, max(len(rest), 1), TOGETHER):
        field = [kernel.chosen, *rest[first : first + TOGETHER]]
        seconds: dict[Tile, list[float]] = {tile: [] for tile in field}
        device.sample([works[tile] for tile in field], lead=1)
        for order in turns(field, rounds):
            for tile, took in zip(order, device.sample([works[tile] for tile in order], lead=1), strict=True):
                seconds[tile].append(took)
        for tile in field:
            speed = statistics.median(c / s for c, s in zip(seconds[kernel.chosen], seconds[tile], strict=True))
            record.row(
                "tiles",
                **keys(entry),
                kernel=kernel.name,
                tile=_text(tile),
                chosen=tile == kernel.chosen,
                us=1e6 * statistics.median(seconds[tile]),
                speed=speed,
            )


def _comparable(result: Any) -> Tensor:
    """What does not depend on the tile: of the weight gradient the sum of its parts."""
    return (result[0].sum(0) if isinstance(result, tuple) else result).float()


def _text(tile: Tile) -> str:
    """A tile's numbers in their order."""
    return " ".join(map(str, tile))


def _on(kernel: Kernel, tile: Tile) -> Call:
    def call() -> Any:
        with kernel.with_tile(tile):
            return kernel.call()

    return call
