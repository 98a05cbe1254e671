"""The paper's classification networks, vanilla (``alpha=None``) or with SPConv for their 3 x 3 convolutions.

The first convolution (few input channels) and all 1 x 1 convolutions stay as they are, as in the paper. What the
paper leaves open is settled by its published sizes:

- SPConv layers carry a norm on each branch (``branch_norm=True``): without, ResNet-20 at alpha 1/4 has 0.068 M
  parameters, not 0.071 M.
- ResNet-20 has 1 x 1 convolutions with a norm as down-sampling shortcuts ("option B" of He et al.): without, alpha 1/4
  would have 0.068 M parameters again, and the vanilla network 41.30 M operations by the paper's count, not 41.62 M.
- That count is multiply-accumulates of convolutions and linear layers plus 4 per element that a batch norm reads; at
  alpha 1/2 and 1/4 the paper prints 0.54 M more than that, which convolutions cannot account for.
- VGG-16 has a classifier of 512 -> 512 -> classes: alpha 1/2 to 1/16 then have the paper's 5.6 M to 2.39 M parameters.
  Its vanilla network has 14.99 M; the 16.62 M printed there is one with a 1 x 1 beside each 3 x 3 convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .channels import legal_alpha
from .modules import SPConv2d

__all__ = ["MODELS", "VGG", "ResNet", "legal_alpha", "resnet20", "resnet50", "vgg16"]


class SPConvOptions(NamedTuple):
    """What every 3 x 3 convolution of a network is built with."""

    alpha: float | None
    groups: int
    branch_norm: bool
    backend: str

    def conv3x3(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        """A 3 x 3 convolution without bias, padding 1: SPConv, or vanilla where alpha is None."""
        if self.alpha is None:
            return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        return SPConv2d(
            in_channels,
            out_channels,
            3,
            stride,
            padding=1,
            groups=self.groups,
            bias=False,
            alpha=legal_alpha(in_channels, self.alpha, self.groups),
            branch_norm=self.branch_norm,
            backend=self.backend,
        )


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: [N, L, H, W] -> [N, M, H / stride, W / stride]."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, options: SPConvOptions) -> None:
        super().__init__()
        self.conv1 = options.conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = options.conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (which strides), 1 x 1, and a shortcut: [N, L, H, W] -> [N, 4 width, H / stride, W / stride]."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, options: SPConvOptions) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = options.conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A stem, stages of residual blocks, global average pooling and a linear classifier.

    The vanilla ResNet-50 has torchvision's parameter names, so its checkpoints load.

    Args:
        block: the kind of residual block.
        depths, widths: blocks of each stage, and the channels of their 3 x 3 convolutions; every stage but the first
            halves the image.
        stem: the first convolution; its output has the channels that the first block takes.
        maxpool: follows the first convolution, its norm and ReLU.
        classes: outputs of the classifier.
        options: of the 3 x 3 convolutions.

    Shape:
        [N, C, H, W] floating point -> [N, classes].
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        stem: nn.Conv2d,
        maxpool: nn.Module,
        classes: int,
        options: SPConvOptions,
    ) -> None:
        super().__init__()
        self.conv1 = stem
        self.bn1 = nn.BatchNorm2d(stem.out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = maxpool
        self.stages = [f"layer{index + 1}" for index in range(len(depths))]
        channels = stem.out_channels
        for index, (name, depth, width) in enumerate(zip(self.stages, depths, widths, strict=True)):
            blocks = []
            for position in range(depth):
                stride = 2 if index and not position else 1
                blocks.append(block(channels, width, stride, options))
                channels = width * block.expansion
            self.add_module(name, nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(self.avgpool(x).flatten(1))


class VGG(nn.Module):
    """Stages of 3 x 3 convolutions, each with norm and ReLU, a 2 x 2 max-pool behind each stage, and two linear layers.

    Shape:
        [N, C, H, W] floating point, H and W at least 32 -> [N, classes].
    """

    def __init__(
        self, depths: Sequence[int], widths: Sequence[int], in_channels: int, classes: int, options: SPConvOptions
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for depth, width in zip(depths, widths, strict=True):
            for _ in range(depth):
                first = not layers
                conv = options._replace(alpha=None) if first else options
                layers += [conv.conv3x3(channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(inplace=True), nn.Linear(channels, classes)
        )
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def resnet20(
    alpha: float | None = None,
    *,
    classes: int = 10,
    in_channels: int = 3,
    groups: int = 2,
    branch_norm: bool = True,
    backend: str = "auto",
) -> ResNet:
    """ResNet-20 for images of about 32 x 32: 0.27 M parameters vanilla, 0.10 M at alpha 1/2, 0.071 M at 1/4.

    Args:
        alpha: ratio of representative channels, in (0, 1], rounded by :func:`legal_alpha` where a layer is too narrow
            for it; None builds the vanilla network.
        classes: outputs.
        in_channels: channels of the image.
        groups, branch_norm, backend: of the SPConv layers; see :class:`spconv_triton.SPConv2d`.

    Returns:
        A network [N, in_channels, H, W] -> [N, classes], in float32 on the CPU.

    Raises:
        TypeError, ValueError: an alpha, groups, branch_norm or backend that SPConv2d cannot have.
    """
    stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
    options = SPConvOptions(alpha, groups, branch_norm, backend)
    return ResNet(BasicBlock, (3, 3, 3), (16, 32, 64), stem, nn.Identity(), classes, options)


def resnet50(
    alpha: float | None = None,
    *,
    classes: int = 1000,
    in_channels: int = 3,
    groups: int = 2,
    branch_norm: bool = True,
    backend: str = "auto",
) -> ResNet:
    """ResNet-50 for images of about 224 x 224, striding in its 3 x 3 convolutions.

    25.56 M parameters vanilla, 18.34 M at alpha 1/2, 16.93 M at 1/4, 16.22 M at 1/8. Arguments, result and errors as
    of :func:`resnet20`.
    """
    stem = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    maxpool = nn.MaxPool2d(3, stride=2, padding=1)
    options = SPConvOptions(alpha, groups, branch_norm, backend)
    return ResNet(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), stem, maxpool, classes, options)


def vgg16(
    alpha: float | None = None,
    *,
    classes: int = 10,
    in_channels: int = 3,
    groups: int = 2,
    branch_norm: bool = True,
    backend: str = "auto",
) -> VGG:
    """VGG-16 for images of at least 32 x 32.

    14.99 M parameters vanilla, 5.6 M at alpha 1/2, 3.77 M at 1/4, 2.85 M at 1/8, 2.39 M at 1/16. Arguments, result and
    errors as of :func:`resnet20`.
    """
    options = SPConvOptions(alpha, groups, branch_norm, backend)
    return VGG((2, 2, 3, 3, 3), (64, 128, 256, 512, 512), in_channels, classes, options)


MODELS: dict[str, Callable[..., nn.Module]] = {"resnet20": resnet20, "resnet50": resnet50, "vgg16": vgg16}
"""The networks by name."""


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def _initialise(network: nn.Module) -> None:
    """He initialisation of the vanilla convolutions; an SPConv layer initialises itself."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
