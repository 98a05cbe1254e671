"""The layer as its authors published it (3 x 3, padding 1, two groups), for comparison: norms and pooling as modules.

Parameter names are theirs, so that their checkpoints fit. With an odd size at stride 2 its branches disagree.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from spconv_triton import SPConv2d


class PublishedSPConv(nn.Module):
    """Their training-time graph; ``norm=False`` leaves the two branch norms out, as in the paper's equations."""

    def __init__(
        self, inplanes: int, outplanes: int, stride: int = 1, ratio: float = 0.5, *, norm: bool = True
    ) -> None:
        super().__init__()
        self.split = int(inplanes * ratio)
        self.gwc = nn.Conv2d(self.split, outplanes, 3, stride, 1, groups=2, bias=False)
        self.pwc = nn.Conv2d(self.split, outplanes, 1, bias=False)
        self.conv1x1 = nn.Conv2d(inplanes - self.split, outplanes, 1)
        self.shrink = nn.AvgPool2d(2, 2) if stride == 2 else nn.Identity()
        self.bn1 = nn.BatchNorm2d(outplanes) if norm else nn.Identity()
        self.bn2 = nn.BatchNorm2d(outplanes) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        representative, redundant = x[:, : self.split], x[:, self.split :]
        three = self.bn1(self.gwc(representative) + self.pwc(self.shrink(representative)))
        one = self.bn2(self.conv1x1(self.shrink(redundant)))
        pooled = [nn.functional.adaptive_avg_pool2d(branch, 1).flatten(1) for branch in (three, one)]
        ratios = torch.stack(pooled, dim=2).softmax(dim=2)[..., None, None]
        return three * ratios[:, :, 0] + one * ratios[:, :, 1]


def as_published(network: nn.Module) -> nn.Module:
    """A network with the published layer in place of ours, freshly initialised."""
    network = copy.deepcopy(network)
    for path, layer in list(network.named_modules()):
        if isinstance(layer, SPConv2d):
            parent, _, name = path.rpartition(".")
            theirs = PublishedSPConv(layer.in_channels, layer.out_channels, layer.stride[0], layer.alpha)
            setattr(network.get_submodule(parent), name, theirs)
    return network
