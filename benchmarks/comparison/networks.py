"""The network benchmark: the paper's networks with each competitor, as they are trained and as they are deployed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.allocator import settle
from benchmarks.comparison.memory import peak_bytes
from benchmarks.comparison.rounds import Effort, compare
from benchmarks.competitors import DEVICE, LAYOUTS, wait_for
from benchmarks.logits import calibrated, check, right
from benchmarks.networks import IMAGES
from benchmarks.peers import NAMES, TITLES, build_network, count_macs, count_parameters
from benchmarks.peers.catalogue import COMPILED, VARIANTS
from benchmarks.turns import fastest
from spconv_triton import fuse
from spconv_triton.training.measure import forward_pass, training_step

Row = dict[str, Any]

CLASSES = {"resnet50": 1000}

DEPLOYED = " deployed"
"""Ends the name of what :func:`spconv_triton.fuse` has made of a network, with plain convolutions' norms folded."""

DEPLOYED_TITLES = {
    f"{name}{DEPLOYED}": f"{title}, deployed"
    for name, title in TITLES.items()
    if not name.endswith(VARIANTS) and name != "octconv"
}
"""By name. OctConv's maps come in pairs, between which ``fuse`` finds next to nothing that folds."""


@dataclass(frozen=True)
class Load:
    """What a network is given.

    Attributes:
        batch: images.
        step: whether it trains on them, or infers.
        compiled: who runs compiled too, which takes up to minutes to prepare.
    """

    network: str
    batch: int
    step: bool = False
    compiled: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.network}, N = {self.batch}, {'training step' if self.step else 'inference'}"


class Networks:
    """The competitors in one network, built once, in eval mode, their norms' statistics those of the images.

    Args:
        network: of :data:`benchmarks.peers.NETWORKS`.
        size: height and width of the images; None takes what the network was published for.
    """

    def __init__(self, network: str, size: int | None = None) -> None:
        self.network, self.size = network, size or IMAGES[network]
        classes = CLASSES.get(network, 10)
        images = self.images(4)
        self.models: dict[str, nn.Module] = {}
        for name in NAMES:
            if not name.endswith(VARIANTS):
                torch.manual_seed(0)
                self.models[name] = calibrated(build_network(network, name, classes=classes).to(DEVICE), images)
        self.classes = classes

    def images(self, batch: int) -> Tensor:
        torch.manual_seed(1)
        return torch.randn(batch, 3, self.size, self.size, device=DEVICE)

    def sizes(self) -> list[Row]:
        """Parameters and MACs of one image."""
        shape = (1, 3, self.size, self.size)
        return [
            {
                "network": self.network,
                "name": name,
                "parameters": count_parameters(model),
                "macs": count_macs(model, shape),
            }
            for name, model in self.models.items()
        ]

    @functools.cached_property
    def deployed(self) -> dict[str, nn.Module]:
        """What is run for inference, of each network of :data:`DEPLOYED_TITLES`."""
        return {
            f"{name}{DEPLOYED}": fuse(model, plain_norms=True)
            for name, model in self.models.items()
            if f"{name}{DEPLOYED}" in DEPLOYED_TITLES
        }

    def measure(self, load: Load, effort: Effort) -> list[Row]:
        """A row for each competitor; one whose logits are wrong has an ``error`` and no times."""
        settle()
        images = self.images(load.batch)
        laid_out = {layout: images.contiguous(memory_format=memory) for layout, memory in LAYOUTS.items()}
        models = dict(self.models)
        if not load.step:
            models |= self.deployed
        expected = {
            (name, layout): right(model, laid_out[layout]) for name, model in self.models.items() for layout in LAYOUTS
        }
        rows: dict[str, Row] = {}
        calls: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            rows[name] = {"network": self.network, "batch": load.batch, "step": load.step, "name": name}
            if name.endswith(DEPLOYED):
                rows[name] |= {"norms": count_norms(self.models[_eager(name)]), "norms_left": count_norms(model)}
            choice = {}
            try:
                for layout, memory_format in LAYOUTS.items():
                    copied = copy.deepcopy(model).to(memory_format=memory_format)
                    check(f"{name}, {layout}", copied, laid_out[layout], expected[_eager(name), layout])
                    choice[layout] = _call(model, images, layout, load.step, self.classes)
                    choice[layout]()
            except (AssertionError, RuntimeError) as error:
                rows[name]["error"] = str(error).partition("\n")[0]
                continue
            rows[name]["layout"] = fastest(choice, rounds=3)
            calls[name] = choice[rows[name]["layout"]]
        for name in load.compiled:
            if "error" in rows[name]:
                continue
            key, layout = f"{name}{COMPILED}", rows[name]["layout"]
            rows[key] = {**rows[name], "name": key}
            model = copy.deepcopy(models[name]).to(memory_format=LAYOUTS[layout])
            compiled = torch.compile(model, dynamic=False)
            try:
                if not load.step:
                    check(key, compiled, laid_out[layout], expected[_eager(name), layout])
                call = _call(compiled, images, layout, load.step, self.classes)
                call()
            except (AssertionError, RuntimeError) as error:
                rows[key]["error"] = str(error).partition("\n")[0]
                continue
            calls[key] = call
        for name, timing in compare(calls, effort).items():
            rows[name] |= {"seconds": timing.seconds, "rounds": timing.rounds}
            if "conv2d" in calls:  # else there is nothing to compare with
                rows[name]["speed"] = timing.speeds
            rows[name]["peak_bytes"] = peak_bytes(calls[name], DEVICE)
        return list(rows.values())


def count_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def _eager(name: str) -> str:
    """Whose logits a network should have: deployed or compiled, it is the same."""
    return name.partition(" ")[0]


def _call(model: nn.Module, images: Tensor, layout: str, step: bool, classes: int) -> Callable[[], object]:
    """A copy at work in one memory format; returns once it is done."""
    memory_format = LAYOUTS[layout]
    images = images.contiguous(memory_format=memory_format)
    model = copy.deepcopy(model).to(memory_format=memory_format)
    if step:
        labels = torch.arange(len(images), device=images.device) % classes
        work = training_step(model, images, labels)
    else:
        work = forward_pass(model, images)
    return functools.partial(wait_for, work)
