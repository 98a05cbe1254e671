"""Peers that can stand where an ``nn.Conv2d`` stands: [N, L, H, W] -> [N, M, H / stride, W / stride].

All have k odd, padding (k - 1) / 2 and no bias. ``norm=True`` adds the batch norm and ReLU that the authors of a peer
put between its convolutions when they train it; the norm and activation behind a layer are its network's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, *, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps height and width (over the stride), He-initialised by what it sums over.

    Raises:
        ValueError: an even kernel size, or channels that groups does not divide.
    """
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
    return layer


def norm_and_relu(channels: int, norm: bool) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)) if norm else nn.Identity()


class Ghost(nn.Module):
    """Ghost module: an ordinary convolution makes one in ``ratio`` of the maps, depthwise ones make the rest from them.

    Han et al., "GhostNet: More Features from Cheap Operations", CVPR 2020, equations 2 to 4: Y' = X * f' with M / s
    maps, y_ij = Phi_ij(y'_i), and the identity as one of each map's s operations.

    Args:
        ratio: s.
        cheap_size: d, of the depthwise kernels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        ratio: int = 2,
        cheap_size: int = 3,
        norm: bool = False,
    ) -> None:
        super().__init__()
        intrinsic = -(-out_channels // ratio)
        self.out_channels = out_channels
        self.primary = conv(in_channels, intrinsic, kernel_size, stride)
        self.norm = norm_and_relu(intrinsic, norm)
        self.cheap = conv(intrinsic, intrinsic * (ratio - 1), cheap_size, groups=intrinsic)

    def forward(self, x: Tensor) -> Tensor:
        intrinsic = self.primary(x)
        ghosts = self.cheap(self.norm(intrinsic))
        return torch.cat((intrinsic, ghosts), 1)[:, : self.out_channels]


class HetConv(nn.Module):
    """Heterogeneous kernels: each filter has k x k kernels on one in P of its input channels and 1 x 1 on the others.

    Singh et al., "HetConv: Heterogeneous Kernel-Based Convolutions for Deep CNNs", CVPR 2019, section 3: (k^2 / P +
    1 - 1 / P) L M weights. Which channels get the k x k kernels moves on from filter to filter; here the filters that
    share theirs are neighbours, and so are those channels, which only renames both. All k x k kernels are then one
    convolution with P groups, and all 1 x 1 kernels one matrix with P zero blocks.

    Args:
        part: P; divides both numbers of channels.

    Raises:
        ValueError: it does not.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, *, part: int = 4
    ) -> None:
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % part:
                raise ValueError(f"part must divide {name}={channels}, got {part}")
        self.part, self.stride = part, stride
        self.spatial = conv(in_channels, out_channels, kernel_size, stride, groups=part)
        own = in_channels // part
        self.weight_pointwise = nn.Parameter(torch.empty(out_channels, in_channels - own))
        summed = own * kernel_size**2 + in_channels - own
        for weight in (self.spatial.weight, self.weight_pointwise):
            nn.init.normal_(weight, std=(2 / summed) ** 0.5)
        self._dense: tuple[tuple[object, ...], Tensor] | None = None

    @property
    def zeros(self) -> int:
        """Weights of the 1 x 1 matrix that are zero, and no parameters: products that the equations do not have."""
        return self.spatial.out_channels * self.spatial.in_channels // self.part

    def pointwise(self) -> Tensor:
        """The 1 x 1 kernels as an ordinary weight, [M, L, 1, 1]; in inference it is made once."""
        weight = self.weight_pointwise
        if torch.is_grad_enabled():
            return self._expand(weight)
        key = (weight._version, weight.data_ptr(), weight.dtype, weight.device)
        if self._dense is None or self._dense[0] != key:
            self._dense = key, self._expand(weight)
        return self._dense[1]

    def _expand(self, weight: Tensor) -> Tensor:
        own = self.spatial.in_channels // self.part
        blocks = weight.chunk(self.part)
        gap = weight.new_zeros(len(blocks[0]), own)
        rows = [torch.cat((b[:, : i * own], gap, b[:, i * own :]), 1) for i, b in enumerate(blocks)]
        return torch.cat(rows)[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.spatial(x) + F.conv2d(x, self.pointwise(), stride=self.stride)


class Separable(nn.Module):
    """Depthwise-separable: a k x k kernel for each input channel, then a 1 x 1 convolution; k^2 L + L M weights.

    Howard et al., "MobileNets", 2017, section 3.1.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, *, norm: bool = False
    ) -> None:
        super().__init__()
        self.depthwise = conv(in_channels, in_channels, kernel_size, stride, groups=in_channels)
        self.norm = norm_and_relu(in_channels, norm)
        self.pointwise = conv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.norm(self.depthwise(x)))


class GroupedShuffle(nn.Module):
    """A convolution in G groups, and a shuffle by which the next one's groups see all of them; k^2 L M / G weights.

    Zhang et al., "ShuffleNet", CVPR 2018, section 3.1: the G x M / G output channels, transposed.

    Args:
        groups: G; divides both numbers of channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, *, groups: int = 4
    ) -> None:
        super().__init__()
        self.conv = conv(in_channels, out_channels, kernel_size, stride, groups=groups)
        self.shuffle = nn.ChannelShuffle(groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.conv(x))


class PartialConv(nn.Module):
    """PConv and the 1 x 1 convolution that it needs: a k x k convolution of the first c channels, the others as are.

    Chen et al., "Run, Don't Walk: Chasing Higher FLOPS for Faster Neural Networks", CVPR 2023, section 3.2: k^2 c^2
    weights with c = L / 4, then L M. At a stride both parts keep the pixels that the 1 x 1 convolution would read.

    Args:
        share: c / L.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, *, share: float = 0.25
    ) -> None:
        super().__init__()
        self.convolved = max(int(in_channels * share), 1)
        self.stride = stride
        self.partial = conv(self.convolved, self.convolved, kernel_size, stride)
        self.pointwise = conv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        untouched = x[:, self.convolved :, :: self.stride, :: self.stride]
        return self.pointwise(torch.cat((self.partial(x[:, : self.convolved]), untouched), 1))
