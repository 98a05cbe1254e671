"""Networks that people use, converted: they train, compile, save and export as they did before.

Sizes of images are the smallest that the networks take; their depth and width are their own.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from spconv_triton import SPConv2d, convert
from spconv_triton.conversion import Conversion


class UNet(nn.Module):
    """Two halvings, their mirror image with transposed convolutions, and skips that are concatenated."""

    def __init__(self, width: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.down = nn.ModuleList([self.block(3, width), self.block(width, 2 * width)])
        self.bottom = self.block(2 * width, 4 * width)
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2), nn.ConvTranspose2d(2 * width, width, 2, stride=2)]
        )
        self.merge = nn.ModuleList([self.block(4 * width, 2 * width), self.block(2 * width, width)])
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def block(in_channels: int, out_channels: int) -> nn.Sequential:
        """Without norms, so that a ReLU writes into what the convolution returned."""
        return nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, padding_mode="reflect"),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat((skips.pop(), up(x)), 1))
        return self.head(x)


@dataclass(frozen=True)
class Client:
    """A network of somebody else's.

    Attributes:
        build: makes it, with random weights.
        convolutions, swapped: how many it has, and how many of them are swapped.
        pixels: height and width of its images.
        backend: of ``torch.compile``, which gets the whole network in one graph, with its backward unless "eager".
        part: the submodule that is compiled and exported, where the original network as a whole cannot be.
    """

    build: Callable[[], nn.Module]
    convolutions: int
    swapped: int
    pixels: int = 64
    backend: str = "eager"
    part: str = ""


def without_weights(build: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: build(weights=None, **options)


tv = torchvision.models
CLIENTS = {
    "unet": Client(UNet, 13, 9, backend="aot_eager"),
    "resnet18": Client(without_weights(tv.resnet18), 20, 16, backend="aot_eager"),
    "resnet50": Client(without_weights(tv.resnet50), 53, 16),
    "vgg16_bn": Client(without_weights(tv.vgg16_bn, num_classes=10), 13, 12, pixels=32),
    "densenet121": Client(without_weights(tv.densenet121), 120, 58),
    # Neither Dynamo nor torch.export takes its proposals, whose number depends on the image.
    "fasterrcnn": Client(
        without_weights(tv.detection.fasterrcnn_resnet50_fpn, weights_backbone=None, min_size=64, max_size=64),
        64,
        21,
        part="backbone",
    ),
    "deeplabv3": Client(without_weights(tv.segmentation.deeplabv3_resnet50, weights_backbone=None), 61, 20),
    "timm-resnet50": Client(lambda: timm.create_model("resnet50", zero_init_last=False), 53, 16),
}

# Their k x k convolutions are grouped already.
SLIM = {"regnetx_002": "is grouped", "efficientnet_b0": "is depthwise"}


@dataclass
class Converted:
    """A client with its network, converted."""

    client: Client
    network: nn.Module
    report: Conversion

    def fresh(self) -> nn.Module:
        """Another one, with other weights."""
        return convert(self.client.build(), 0.25)

    def part(self, network: nn.Module | None = None) -> nn.Module:
        """What is compiled and exported."""
        return (network or self.network).get_submodule(self.client.part)

    def images(self) -> Tensor:
        return torch.rand(2, 3, self.client.pixels, self.client.pixels)

    def loss(self, network: nn.Module) -> Tensor:
        """Of a training step."""
        images = self.images()
        if self.client.part != "backbone":
            return loss_of(network(images))
        box = torch.tensor([[6.0, 10.0, 40.0, 56.0]])
        targets = [{"boxes": box, "labels": torch.tensor([1])} for _ in images]
        return sum(network(list(images), targets).values())


def loss_of(output: Any) -> Tensor:
    outputs = output.values() if isinstance(output, dict) else [output]
    return sum((value - 1).square().mean() for value in outputs)


@pytest.fixture(scope="module")
def converted(request: pytest.FixtureRequest) -> Converted:
    """One network for all tests of a client: the large ones take seconds to build."""
    client = CLIENTS[request.param]
    reports: list[Conversion] = []
    network = convert(client.build(), 0.25, report=reports.append)
    return Converted(client, network, reports[0])


every_client = pytest.mark.parametrize("converted", sorted(CLIENTS), indirect=True, scope="module")


@pytest.fixture(autouse=True)
def reset_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@every_client
def test_converts(converted: Converted) -> None:
    client, report = converted.client, converted.report
    layers = [m for m in converted.network.modules() if isinstance(m, SPConv2d)]
    assert len(report.swapped) == len(layers) == client.swapped
    assert len(report.swapped) + len(report.kept) == client.convolutions
    expected = ("input channels, fewer than", "is 1 x 1", "is a transposed convolution", "no multiple of groups")
    assert [str(decision) for decision in report.kept if not any(e in decision.reason for e in expected)] == []
    assert all(layer.representative_channels * 4 == layer.in_channels for layer in layers)


@every_client
def test_trains(converted: Converted) -> None:
    network = converted.network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    loss = converted.loss(network)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
    for name, layer in network.named_modules():
        if isinstance(layer, SPConv2d):
            still = [key for key, parameter in layer.named_parameters() if not parameter.grad.any()]
            assert not still, f"{name} does not learn: {still}"
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.isfinite().all() for p in network.parameters())


@every_client
def test_saves_and_loads(converted: Converted) -> None:
    network, other = converted.network.eval(), converted.fresh().eval()
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    images = converted.images()
    with torch.no_grad():
        expected, got = (flat(converted.part(n)(images)) for n in (network, other))
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def flat(output: Any) -> dict[str, Tensor]:
    return dict(output) if isinstance(output, dict) else {"": output}


def assert_close(got: Any, expected: Any) -> None:
    expected, got = flat(expected), flat(got)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert value.isfinite().all(), name
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4 * value.abs().max().item(), msg=name)


@pytest.mark.drawn(4, "converted", sorted(CLIENTS), indirect=True, scope="module")
def test_compiles_in_one_graph(converted: Converted) -> None:
    part, backend = converted.part().eval(), converted.client.backend
    images = converted.images()
    with torch.set_grad_enabled(backend != "eager"):
        expected = part(images)
        got = torch.compile(part, backend=backend, fullgraph=True)(images)
    assert_close(got, expected)
    if backend != "eager":
        names = [name for name, _ in part.named_parameters()]
        gradients = [torch.autograd.grad(loss_of(y), list(part.parameters())) for y in (got, expected)]
        assert_close(*(dict(zip(names, values, strict=True)) for values in gradients))


def test_inductor_compiles_a_block() -> None:
    """Training, as one graph; whole networks take it minutes on a CPU."""
    block = convert(UNet.block(16, 8)).double()
    x = torch.rand(2, 16, 9, 8, dtype=torch.float64)
    expected, got = block(x), torch.compile(block, fullgraph=True)(x)
    assert_close(got, expected)
    gradients = [torch.autograd.grad(loss_of(y), list(block.parameters())) for y in (got, expected)]
    for name, got, expected in zip(dict(block.named_parameters()), *gradients, strict=True):
        torch.testing.assert_close(got, expected, msg=name)


@pytest.mark.drawn(4, "converted", sorted(CLIENTS), indirect=True, scope="module")
def test_exports(converted: Converted) -> None:
    part, images = converted.part().eval(), converted.images()
    with torch.no_grad():
        program = torch.export.export(part, (images,))
        assert_close(program.module()(images), part(images))


@pytest.mark.parametrize("name", SLIM)
def test_slim_networks_stay_what_they_are(name: str) -> None:
    """So they compile and export as before; there is nothing of ours in them."""
    model = timm.create_model(name)
    before = copy.deepcopy(model.state_dict()).keys()
    modules = list(model.modules())
    reports: list[Conversion] = []
    assert convert(model, report=reports.append) is model
    assert reports[0].swapped == ()
    assert all(new is old for new, old in zip(model.modules(), modules, strict=True))
    assert model.state_dict().keys() == before
    k_by_k = [d for d in reports[0].kept if d.reason != "is 1 x 1" and "fewer than" not in d.reason]
    assert k_by_k
    assert all(decision.reason.startswith(SLIM[name]) for decision in k_by_k)
    loss_of(model(torch.rand(2, 3, 32, 32))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
