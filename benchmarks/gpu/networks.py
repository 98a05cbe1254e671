"""ResNet-50 whole: training steps and inference, vanilla and with SPConv."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from cases import assert_within_budget
from torch import Tensor, nn

from benchmarks.gpu import plan
from benchmarks.gpu.checks import multiplied_as
from benchmarks.gpu.device import Device, device_of
from benchmarks.gpu.layers import captured, report, tuning, waiting
from benchmarks.gpu.record import Record
from spconv_triton import models

NETWORKS: dict[str, dict[str, Any]] = {
    "vanilla": {"alpha": None},
    "SPConv 1/2": {"alpha": 0.5, "branch_norm": False},
    "SPConv 1/2, branch norms": {"alpha": 0.5, "branch_norm": True},
}
"""By name; the first is what the others are compared with."""


def networks(record: Record) -> None:
    """Images of 224 x 224, channels_last: training under bfloat16 autocast, inference in float16."""
    device = device_of(record)
    batch, side = (1, 2) if record.rehearsal else (plan.NETWORK, 224)
    torch.manual_seed(0)
    built = {name: _network(record, **options) for name, options in NETWORKS.items()}
    vanilla, *others = built
    right = {vanilla: built[vanilla]}
    for name in others:
        with multiplied_as("ieee"), record.check(f"{name}: logits in float32", device.synchronize):
            _logits_agree(device, built[name], min(batch, 4), side)
            right[name] = built[name]
    built = right  # of another nothing is timed
    with tuning(record):
        steps: dict[str, Callable[[], Any]] = {}
        for name, network in built.items():
            with record.check(f"{name}: a training step", device.synchronize):
                step = _training(device, copy.deepcopy(network), batch, side)
                step()
                peak = device.peak_bytes(step)
                record.row("network memory", network=name, batch=batch, peak_gb=None if peak is None else peak / 1e9)
                steps[name] = step
        _report(record, device, steps, batch, "bfloat16 autocast", "step")
        steps.clear()
        for images in dict.fromkeys((batch, 1)):
            calls = {}
            for name, network in built.items():
                with record.check(f"{name}: inference, N = {images}", device.synchronize):
                    call = _inference(device, copy.deepcopy(network), images, side)
                    assert call().isfinite().all(), "logits are not finite"
                    calls[name] = call
            _report(record, device, calls, images, "float16", "forward")


def _report(
    record: Record, device: Device, calls: dict[str, Callable[[], Any]], batch: int, dtype: str, direction: str
) -> None:
    """Until the result is there, called from Python; one image as a CUDA graph too."""
    keys = {"layer": "ResNet-50", "batch": batch, "dtype": dtype}
    with record.check(f"ResNet-50, N = {batch}, {direction}: timed", device.synchronize):
        report(record, keys, direction, "called", calls, waiting(device))
        if batch > 1 or direction == "step":
            return
        replays = captured(device, calls)
        if replays:
            report(record, keys, direction, "graph", replays, waiting(device))
        else:
            record.needs_gpu("replays of CUDA graphs")


def _network(record: Record, **options: Any) -> nn.Module:
    if not record.rehearsal:
        return models.resnet50(**options)
    layers = models.SPConvOptions(options["alpha"], 2, options.get("branch_norm", False), "triton")
    return models.VGG((2,), (4,), 3, 10, layers)


def _images(device: Device, batch: int, side: int, dtype: torch.dtype = torch.float32) -> Tensor:
    images = torch.randn(batch, 3, side, side, device=device.name, dtype=dtype)
    return images.contiguous(memory_format=torch.channels_last)


def _logits_agree(device: Device, network: nn.Module, batch: int, side: int) -> None:
    """With float64, about as well as the same network of the paper's equations does."""
    x = _images(device, batch, side)
    network = copy.deepcopy(network).to(device.name, memory_format=torch.channels_last).eval()
    equations = copy.deepcopy(network)
    for layer in equations.modules():
        if hasattr(layer, "backend"):
            layer.backend = "reference"
    with torch.no_grad():
        same_dtype, got = equations(x), network(x)
        exact = equations.double()(x.double())
    assert_within_budget("logits", got, same_dtype, exact, condition=64.0)


def _training(device: Device, network: nn.Module, batch: int, side: int) -> Callable[[], Tensor]:
    network.to(device.name, memory_format=torch.channels_last).train()
    x = _images(device, batch, side)
    classes = torch.arange(batch, device=device.name) % 10
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.name, torch.bfloat16):
            loss = nn.functional.cross_entropy(network(x), classes)
        loss.backward()
        optimizer.step()
        return loss

    return step


def _inference(device: Device, network: nn.Module, batch: int, side: int) -> Callable[[], Tensor]:
    network.to(device.name, torch.float16, memory_format=torch.channels_last).eval()
    x = _images(device, batch, side, torch.float16)

    def call() -> Tensor:
        with torch.inference_mode():
            return network(x)

    return call
