"""fuse across modules: networks that are traced in parts, and those of torchvision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_within_budget
from fuse_cases import CHANNELS, Net, check, fusion, images, layer, layers, norm, stirred
from torch import Tensor, nn

from spconv_triton import SPConv2d, convert, fuse


class Dynamic(nn.Module):
    """Control flow that depends on values, around parts that have none."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(layer(), norm(), nn.ReLU())
        self.block = Net(lambda p, x: F.relu(p.norm(p.conv(x)) + x), conv=layer(), norm=norm())
        self.last = layer()

    def forward(self, x: Tensor) -> Tensor:
        y = self.backbone(x)
        for _ in range(int(y.mean().abs() < 100) + 1):
            y = self.block(y)
        return F.relu(self.last(y))


def test_parts_of_what_cannot_be_traced_are_fused() -> None:
    for model in (Dynamic(), nn.Sequential(Dynamic(), layer(), norm())):
        prefix = "" if isinstance(model, Dynamic) else "0."
        parts = [
            (f"{prefix}backbone.1", "relu"),
            (f"{prefix}block.parts.norm", "residual", "relu"),
            *([("2",)] if prefix else []),
        ]
        fused = check(model, *parts)
        assert isinstance(fused if isinstance(model, Dynamic) else fused[0], Dynamic)
        assert "is not called in any forward that can be traced" in fusion(model).kept[0].reason


def test_a_layer_shared_by_parts_that_are_traced_separately_stays() -> None:
    model = Dynamic()
    model.block.parts["conv"] = model.backbone[0]
    found = fusion(model.eval())
    assert found.fused == ()
    assert "is shared by parts that are traced separately" in found.kept[0].reason


def test_tracing_leaves_no_symbol_behind() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = layer(), norm()
            self.last: Any = None
            self.register_buffer("kept", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.kept = x
            return self.norm(self.conv(x))

    fused = fuse(nn.Sequential(Remembers()).eval())
    assert fused[0].last is None
    assert torch.equal(fused[0].kept, torch.zeros(1))


@pytest.fixture
def torchvision() -> ModuleType:
    """Not beside every PyTorch: it must be the one built for it."""
    return pytest.importorskip("torchvision")


def test_detector_with_a_fused_backbone(torchvision: ModuleType) -> None:
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, box_score_thresh=0.0, box_detections_per_img=5
    )
    convert(model, include="*fpn*")
    found = fusion(model.eval())
    assert len(found.fused) + len(found.kept) == 2
    picture = [torch.rand(3, 80, 96)]
    with torch.no_grad():
        for key, value in model(picture)[0].items():
            torch.testing.assert_close(fuse(model)(picture)[0][key], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("resnet18", 16),
        ("resnet50", 16),
        ("densenet121", 0),
        ("vgg11_bn", 7),
    ],
)
def test_networks_of_torchvision(torchvision: ModuleType, name: str, folded: int) -> None:
    with torch.device("meta"):
        model = convert(getattr(torchvision.models, name)(weights=None)).eval()
    found = fusion(model)
    assert len(found.fused) == folded, str(found)
    assert all(fold.folded[-1] == "relu" for fold in found.fused)


def test_resnet18(torchvision: ModuleType) -> None:
    model = stirred(convert(torchvision.models.resnet18(weights=None, num_classes=10))).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.abs_().add_(0.5)
    fused = fuse(model)
    x = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert_within_budget("logits", fused(x), model(x), exact)
        assert_within_budget("logits", fuse(copy.deepcopy(model).double())(x.double()), exact, exact)
    assert "norm=True, residual=True, activation='relu'" in repr(fused.layer1[0].conv2)
    assert sum(isinstance(m, SPConv2d) for m in fused.modules()) == 0


class Branch(nn.Module):
    """Of two layers, of which one folds what follows it here, and the other what follows the module."""

    def __init__(self, *, normed: bool) -> None:
        super().__init__()
        self.one, self.two = layer(), layer()
        self.norm = norm() if normed else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(F.relu(y + x if self.norm is None else self.norm(y)))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_what_follows_inside_and_outside_a_module(normed: bool, depth: int) -> None:
    def forward(p: Any, x: Tensor) -> Tensor:
        return F.relu(p.norm(p.branch(x)) + x)

    model: nn.Module = Branch(normed=normed)
    for _ in range(depth):
        model = Net(forward, branch=model, norm=norm())
    model = model.eval()
    fused, x = fuse(model), images()
    assert len(layers(fused)) == 2
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_an_inverted_mask_is_traced() -> None:
    check(Net(lambda p, x: F.relu(p.norm(p.conv(x)) * ~(x > 0)), conv=layer(), norm=norm()), ("parts.norm",))


class Apart(nn.Module):
    """Calls its parts one by one, which cannot be traced."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts[: int(x.abs().sum() > 0) * len(self.parts)]:
            x = part(x)
        return x


@pytest.mark.parametrize("first", [layer, lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)], ids=["spconv", "plain"])
def test_a_norm_shared_by_parts_traced_separately_stays(first: Callable[[], nn.Module]) -> None:
    shared = norm()
    model = Apart(nn.Sequential(first(), shared), nn.Sequential(nn.ReLU(), shared)).eval()
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(fuse(model, plain_norms=True)(x), model(x))
