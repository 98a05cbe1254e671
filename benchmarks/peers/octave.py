"""Octave convolution, and networks in which all maps between two layers come in two resolutions.

Chen et al., "Drop an Octave: Reducing Spatial Redundancy in Convolutional Neural Networks with Octave Convolution",
ICCV 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.layers import conv
from spconv_triton.models import VGG, BasicBlock, Bottleneck, ResNet


@dataclass
class Octaves:
    """Maps at full resolution, and the maps of low frequency at half of it (odd sizes rounded up).

    Attributes:
        high: [N, C - c, H, W].
        low: [N, c, H / 2, W / 2].
    """

    high: Tensor
    low: Tensor

    def __add__(self, other: Octaves) -> Octaves:
        return Octaves(self.high + other.high, self.low + other.low)


Maps = Tensor | Octaves


class OctConv(nn.Module):
    """An ordinary convolution's weights, shared out to the four ways from two resolutions to two; k^2 L M of them.

    Section 3.3: Y_H = f(X_H; W_HH) + upsample(f(X_L; W_LH), 2), Y_L = f(X_L; W_LL) + f(pool(X_H, 2); W_HL). At stride 2
    average pooling goes before, as in section 3.4: strided convolutions would shift the two against each other. X_L
    then has Y_H's resolution as it is, and is neither pooled nor upsampled on its way there.

    Args:
        stride: 1 or 2.
        alpha_in, alpha_out: share of the maps of low frequency; where it is 0, a plain tensor comes or goes.

    Raises:
        ValueError: another stride.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        alpha_in: float = 0.5,
        alpha_out: float = 0.5,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        low_in, low_out = int(alpha_in * in_channels), int(alpha_out * out_channels)
        high_in, high_out = in_channels - low_in, out_channels - low_out
        self.stride = stride

        def way(source: int, target: int) -> nn.Conv2d | None:
            if not source or not target:
                return None
            layer = conv(source, target, kernel_size)
            summed = in_channels * kernel_size**2  # both ways end in one sum
            nn.init.normal_(layer.weight, std=(2 / summed) ** 0.5)
            return layer

        self.high_to_high, self.high_to_low = way(high_in, high_out), way(high_in, low_out)
        self.low_to_high, self.low_to_low = way(low_in, high_out), way(low_in, low_out)

    def forward(self, x: Maps) -> Maps:
        high, low = (x, None) if isinstance(x, Tensor) else (x.high, x.low)
        if self.stride == 2:
            high = _halved(high)
        y = self.high_to_high(high)
        if low is not None and self.low_to_high is not None:
            risen = self.low_to_high(low)
            y = y + (risen if self.stride == 2 else F.interpolate(risen, y.shape[-2:], mode="nearest"))
        if self.high_to_low is None:
            return y
        y_low = self.high_to_low(_halved(high))
        if low is not None and self.low_to_low is not None:
            y_low = y_low + self.low_to_low(_halved(low) if self.stride == 2 else low)
        return Octaves(y, y_low)


class Each(nn.Module):
    """A layer for each resolution.

    Args:
        high: of full resolution, and of a plain tensor.
        low: of half; None where there never is one.
    """

    def __init__(self, high: nn.Module, low: nn.Module | None) -> None:
        super().__init__()
        self.high, self.low = high, low

    def forward(self, x: Maps) -> Maps:
        return self.high(x) if isinstance(x, Tensor) else Octaves(self.high(x.high), self.low(x.low))


class Joined(nn.Module):
    """A global pooling of both resolutions, whose channels it puts side by side."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Octaves) -> Tensor:
        return torch.cat((self.pool(x.high), self.pool(x.low)), 1)


def to_octaves(network: nn.Module, alpha: float = 0.5) -> nn.Module:
    """``network``, one of the SPConv paper's, with an OctConv for every convolution behind the first, in place.

    The first OctConv has alpha_in = 0. VGG-16's last has alpha_out = 0. ResNet-50's last stage is plain, as its 7 x 7
    maps cannot be halved, and the ways into it have alpha_out = 0. ResNet-20's first and last blocks add their input to
    their output, so its very first convolution is the one with alpha_in = 0, and global pooling joins what comes out.

    Raises:
        TypeError: another kind of network.
    """
    if isinstance(network, VGG):
        _vgg(network, alpha)
    elif isinstance(network, ResNet):
        _resnet(network, alpha)
    else:
        raise TypeError(f"network must be a VGG or ResNet of spconv_triton.models, got {type(network).__name__}")
    return network


def _vgg(network: VGG, alpha: float) -> None:
    layers = network.features
    places = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    for i, layer in enumerate(layers):
        if i == places[0] or i < places[1]:
            continue
        share = 0.0 if i >= places[-1] else alpha
        if isinstance(layer, nn.Conv2d):
            layers[i] = _convolution(layer, 0.0 if i == places[1] else alpha, share)
        else:
            layers[i] = _each(layer, share)


def _resnet(network: ResNet, alpha: float) -> None:
    blocks = [block for name in network.stages for block in network.get_submodule(name)]
    if isinstance(blocks[0], BasicBlock):
        network.conv1, network.bn1 = _convolution(network.conv1, 0.0, alpha), _each(network.bn1, alpha)
        network.relu, network.maxpool = _each(network.relu, alpha), _each(network.maxpool, alpha)
        network.avgpool = Joined(network.avgpool)
        for block in blocks:
            _block(block, alpha, alpha)
        return
    end = blocks.index(network.get_submodule(network.stages[-1])[0])
    for i, block in enumerate(blocks[: end + 1]):
        _block(block, alpha if i else 0.0, alpha if i < end else 0.0)


def _block(block: BasicBlock | Bottleneck, alpha_in: float, alpha_out: float) -> None:
    share = alpha_in
    for index in ("1", "2", "3") if isinstance(block, Bottleneck) else ("1", "2"):
        setattr(block, f"conv{index}", _convolution(block.get_submodule(f"conv{index}"), share, alpha_out))
        setattr(block, f"bn{index}", _each(block.get_submodule(f"bn{index}"), alpha_out))
        share = alpha_out
    block.relu = _each(block.relu, alpha_out)
    if block.downsample is not None:
        shortcut, norm = block.downsample
        block.downsample = nn.Sequential(_convolution(shortcut, alpha_in, alpha_out), _each(norm, alpha_out))


def _convolution(layer: nn.Module, alpha_in: float, alpha_out: float) -> OctConv:
    return OctConv(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size[0],
        layer.stride[0],
        alpha_in=alpha_in,
        alpha_out=alpha_out,
    )


def _each(layer: nn.Module, alpha: float) -> Each:
    """A norm's channels are shared out to both resolutions; a layer without parameters serves both."""
    if not isinstance(layer, nn.BatchNorm2d):
        return Each(layer, layer)
    low = int(alpha * layer.num_features)
    return Each(nn.BatchNorm2d(layer.num_features - low), nn.BatchNorm2d(low) if low else None)


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2, ceil_mode=True)
