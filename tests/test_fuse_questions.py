"""fuse where a forward does more than compute: it asks, keeps, reaches into its parts. Results stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spconv_triton import SPConv2d, fuse
from spconv_triton.fused import FusedSPConv2d

CHANNELS = 8


class Block(nn.Module):
    """A layer, a norm and a ReLU, of which ``fuse`` makes one where it may."""

    skip = True

    def __init__(self, inputs: int = CHANNELS) -> None:
        super().__init__()
        self.conv = SPConv2d(inputs, CHANNELS, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(CHANNELS)
        nn.init.normal_(self.bn.running_mean)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(self.conv(x)))

    def extra(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class AsksForType(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x if isinstance(x, Tensor) else x)


class AsksForTensor(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x if torch.is_tensor(x) else x)


class AsksInBetween(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(self.bn(y - 1 if isinstance(y, Tensor) else y))


class Tries(Block):
    def forward(self, x: Tensor) -> Tensor:
        try:
            width = int(x.shape[-1])
        except TypeError:
            width = 0
        return super().forward(x) * width


class AsksForLength(Block):
    def forward(self, x: Tensor) -> Tensor:
        try:
            rank = len(x.shape)
        except (TypeError, RuntimeError):
            rank = 0
        return super().forward(x) * rank


class AsksForAttribute(Block):
    def forward(self, x: Any) -> Tensor:
        return super().forward(x.tensors if hasattr(x, "tensors") else x)


class AsksForAttributeByDefault(Block):
    def forward(self, x: Any) -> Tensor:
        return super().forward(x) + getattr(x, "offset", 1)


class AsksForGradients(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if torch.is_grad_enabled() else y


class AsksForInferenceMode(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if torch.is_inference_mode_enabled() else F.relu(self.bn(y))


class AsksForAutocast(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if torch.is_autocast_enabled("cpu") else F.relu(self.bn(y))


class LooksInSet(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if x.dtype in {torch.float32, torch.bfloat16} else F.relu(self.bn(y))


class LooksUp(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if {CHANNELS: True}.get(x.shape[1], False) else F.relu(self.bn(y))


class LooksUpAndTries(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        try:
            return y * {CHANNELS: 2}[x.shape[1]]
        except KeyError:
            return F.relu(self.bn(y))


class AsksForText(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if str(x.device) == "cpu" else F.relu(self.bn(y))


class AsksForExactType(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if type(x) is Tensor else F.relu(self.bn(y))


class PartAsksForExactType(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = AsksForExactType()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + x


class Keeps(Block):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        self.seen.append(super().forward(x))
        return sum(self.seen)


class Sets(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.features = self.conv(x)
        return F.relu(self.bn(self.features))


class ReadsWhatIsSet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Sets()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.block.features


class ReadsClassAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return y + x if self.block.skip else y


class CallsMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.block.extra(x)


class ReadsNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.bn.num_features


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU()
        self.body = nn.Sequential(SPConv2d(CHANNELS, CHANNELS, 3, padding=1), act, SPConv2d(CHANNELS, CHANNELS, 1), act)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * len(self.body)


class Extracts(nn.Module):
    """Every part's result; the assertion is what cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(SPConv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        nn.init.normal_(self.features[1].running_mean)

    def forward(self, x: Tensor) -> Any:
        assert x.shape[1] == CHANNELS
        found = []
        for part in self.features:
            x = part(x)
            found.append(x)
        return tuple(found)


class ExtractsByMethod(Extracts):
    def forward(self, x: Tensor) -> Any:
        assert x.shape[1] == CHANNELS
        return self.collect(x)

    def collect(self, x: Tensor) -> Any:
        found = []
        for part in self.children():
            for inner in part:
                x = inner(x)
                found.append(x)
        return tuple(found)


class Joins(Block):
    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:  # type: ignore[override]
        if skip is not None:
            x = torch.cat([x, skip], 1)
        return F.relu(self.bn(self.conv(x)))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Joins(CHANNELS), Joins(2 * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == CHANNELS
        return self.second(self.first(x, None), x)


class InFloat32(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


QUESTIONS = [
    AsksForType,
    AsksForTensor,
    AsksInBetween,
    Tries,
    AsksForLength,
    AsksForAttribute,
    AsksForAttributeByDefault,
    AsksForGradients,
    AsksForInferenceMode,
    AsksForAutocast,
    LooksInSet,
    LooksUp,
    LooksUpAndTries,
    AsksForText,
    AsksForExactType,
    PartAsksForExactType,
    Sets,
    ReadsWhatIsSet,
    ReadsClassAttribute,
    CallsMethod,
    ReadsNorm,
    Counts,
    Extracts,
    ExtractsByMethod,
    Decoder,
    InFloat32,
]


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("make", QUESTIONS)
def test_results_stay(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    fused = fuse(model, plain_norms=True)
    x = torch.randn(2, CHANNELS, 5, 6)
    with torch.inference_mode():
        for got, expected in zip(as_tuple(fused(x.clone())), as_tuple(model(x.clone())), strict=True):
            torch.testing.assert_close(got, expected)


def test_results_stay_under_autocast() -> None:
    model = AsksForAutocast().eval()
    fused, x = fuse(model), torch.randn(2, CHANNELS, 5, 6)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(x), model(x))


def test_the_region_of_autocast_stays() -> None:
    model = InFloat32().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fuse(model)(torch.randn(2, CHANNELS, 5, 6)).dtype == model(torch.randn(2, CHANNELS, 5, 6)).dtype


def test_lists_hold_what_they_held() -> None:
    model = Keeps().eval()
    fused = fuse(model)
    assert fused.seen == model.seen == []
    x = torch.randn(2, CHANNELS, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
    assert len(fused.seen) == 1


class Checks(Extracts):
    """As above, but its parts are called as one."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == CHANNELS
        return self.features(x)


class Asserts(Block):
    """What its message says is no question."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[1] == CHANNELS, f"{x.shape[1]} channels for {type(self).__name__}")
        return super().forward(x)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.shortcut = Block(), None

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return y if self.shortcut is None else y + self.shortcut(x)


@pytest.mark.parametrize("make", [Block, Checks, Asserts, Optional])
def test_what_asks_nothing_is_fused(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    fused = fuse(model)
    assert sum(isinstance(module, FusedSPConv2d) for module in fused.modules()) == 1
    x = torch.randn(2, CHANNELS, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))


class WithTimm(nn.Module):
    def __init__(self, act: Any, convolution: nn.Module) -> None:
        super().__init__()
        self.conv = convolution
        self.bn = pytest.importorskip("timm.layers").BatchNormAct2d(CHANNELS, act_layer=act)
        nn.init.normal_(self.bn.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


@pytest.mark.parametrize(
    ("act", "name"), [(nn.ReLU, "relu"), (nn.SiLU, "silu"), (nn.LeakyReLU, "none"), (None, "none")]
)
def test_timm_s_norms_with_activations(act: Any, name: str) -> None:
    model = WithTimm(act, SPConv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)).eval()
    before = dict(model.named_modules())
    fused = fuse(model)
    (layer,) = (module for module in fused.modules() if isinstance(module, FusedSPConv2d))
    assert layer.has_norm
    assert layer.activation == name
    assert dict(model.named_modules()) == before
    x = torch.randn(2, CHANNELS, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))


def test_timm_s_norms_behind_plain_convolutions() -> None:
    model = WithTimm(nn.ReLU, nn.Conv2d(CHANNELS, CHANNELS, 1)).eval()
    fused = fuse(model, plain_norms=True)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    x = torch.randn(2, CHANNELS, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))


class AddsInPlace(Block):
    def __init__(self, over: str) -> None:
        super().__init__()
        self.over = over

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        y = self.bn(self.conv(x))
        if self.over == "output":
            y += other
            return F.relu(y)
        other = other * 1
        other += y
        return F.relu(other)


@pytest.mark.parametrize("over", ["output", "residual"])
def test_a_sum_in_place_keeps_the_dtype_of_what_it_is_written_over(over: str) -> None:
    model = AddsInPlace(over).eval().bfloat16()
    fused = fuse(model)
    assert any(isinstance(module, FusedSPConv2d) for module in fused.modules())
    x = torch.randn(2, CHANNELS, 5, 6)
    with torch.no_grad():
        got, expected = fused(x.bfloat16(), x), model(x.bfloat16(), x)
    assert got.dtype == expected.dtype == (torch.bfloat16 if over == "output" else torch.float32)
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.05)
