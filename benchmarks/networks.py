"""Every convolution of the paper's networks, found by running them without computing anything."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from cases import Case
from torch import Tensor, nn

from spconv_triton import SPConv2d, models

IMAGES = {"resnet50": 224, "resnet20": 32, "vgg16": 32}
"""The side of the images that each network was published for: ImageNet's, or CIFAR's."""


class Convolution(NamedTuple):
    """A convolution of a network; those of one shape are one.

    Attributes:
        case: its shape at batch 1; kernel, stride and padding are nn.Conv2d's, alpha and groups SPConv's.
        count: how many the network has.
        replaced: whether SPConv takes its place; the stem and the 1 x 1 convolutions stay.
    """

    case: Case
    count: int
    replaced: bool


@functools.lru_cache
def convolutions(network: str, alpha: float = 0.5) -> tuple[Convolution, ...]:
    """Those of ``network``, a key of :data:`spconv_triton.models.MODELS`, in the order in which they run."""
    with torch.device("meta"):
        vanilla, split = models.MODELS[network](None), models.MODELS[network](alpha)
        image = torch.empty(1, 3, IMAGES[network], IMAGES[network])
    counts: dict[tuple[Case, bool], int] = {}

    def note(name: str, module: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        layer = split.get_submodule(name)
        case = _case(module, inputs[0], layer if isinstance(layer, SPConv2d) else None)
        key = case, isinstance(layer, SPConv2d)
        counts[key] = counts.get(key, 0) + 1

    for name, module in vanilla.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(functools.partial(note, name))
    vanilla(image)
    return tuple(Convolution(case, count, replaced) for (case, replaced), count in counts.items())


def _case(module: nn.Conv2d, x: Tensor, split: SPConv2d | None) -> Case:
    size: tuple[int, int] = (x.shape[2], x.shape[3])
    kernel, stride, padding = (tuple(pair) for pair in (module.kernel_size, module.stride, module.padding))
    stepped = "" if stride == (1, 1) else f" / {stride[0]}"
    name = f"{kernel[0]} x {kernel[1]}{stepped}, {module.in_channels} to {module.out_channels}, {size[0]} x {size[1]}"
    sparse = {} if split is None else {"alpha": split.representative_channels / module.in_channels}
    groups = 2 if split is None else split.groups
    return Case(
        name,
        1,
        module.in_channels,
        module.out_channels,
        size,
        kernel,
        stride,
        padding,
        module.dilation,
        groups,
        **sparse,
    )
