"""fuse(plain_norms=True): the norms behind plain convolutions fold where nothing else can tell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cases import assert_within_budget
from fuse_cases import CHANNELS, Net, images, layer, layers, norm, stirred
from torch import Tensor, nn

from spconv_triton import convert, fuse
from spconv_triton.fusing import Fusion


def plain(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, **options)


def check(model: nn.Module, folded: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """So many norms fold, results are within the budget, and the model is as it was."""
    model = model.eval().to(dtype)
    state = copy.deepcopy(model.state_dict())
    reports: list[Fusion] = []
    fused = fuse(model, plain_norms=True, report=reports.append)
    assert len(reports[0].norms) == folded, str(reports[0])
    x = images(dtype)
    with torch.no_grad():
        got, same_dtype = fused(x), model(x)
        assert_within_budget("y", got, same_dtype, copy.deepcopy(model).double()(x.double()), condition=2)
        again = fuse(fused, plain_norms=True, report=reports.append)
        assert reports[1].norms == ()
        assert torch.equal(again(x), got)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), f"{key} was written to"
    return fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"padding_mode": "circular"}, {"groups": 2}], ids=str)
def test_a_norm_behind_a_plain_convolution(options: dict[str, Any], dtype: torch.dtype) -> None:
    fused = check(nn.Sequential(plain(**options), norm(eps=0.1), nn.ReLU()), 1, dtype)
    assert [type(part) for part in fused] == [nn.Conv2d, nn.Identity, nn.ReLU]


def test_half_precision_weights_are_folded_in_their_dtype() -> None:
    model = nn.Sequential(plain(), norm()).eval().bfloat16()
    x = images(torch.bfloat16)
    fused = fuse(model, plain_norms=True)
    with torch.no_grad():
        y = fused(x)
        exact = copy.deepcopy(model).double()(x.double())
    assert y.dtype == torch.bfloat16
    # The folded weight and bias are rounded once more than the norm's own scale and shift.
    assert (y - exact).abs().max() <= 2**-6 * exact.abs().max()


def test_beside_a_fused_layer() -> None:
    def block(p: Any, x: Tensor) -> Tensor:
        y = F.relu(p.first_norm(p.first(x)))
        y = p.norm(p.conv(y))
        y += p.shortcut_norm(p.shortcut(x))
        return F.relu(y)

    parts = {"first": plain(), "first_norm": norm(), "conv": layer(), "norm": norm()}
    fused = check(Net(block, **parts, shortcut=plain(), shortcut_norm=norm()), 2)
    assert len(layers(fused)) == 1


def test_nothing_folds_unless_asked() -> None:
    model = nn.Sequential(plain(), norm()).eval()
    reports: list[Fusion] = []
    fused = fuse(model, report=reports.append)
    assert reports[0].norms == ()
    x = images()
    with torch.no_grad():
        assert torch.equal(fused(x), model(x))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121", "vgg16_bn"])
def test_networks_of_torchvision(name: str) -> None:
    model = convert(getattr(torchvision.models, name)(weights=None)).eval()
    fused = fuse(model, plain_norms=True)
    left = [n for n, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)]
    convolutions = [m for m in fused.modules() if isinstance(m, nn.Conv2d)]
    assert len(left) == (120 if name == "densenet121" else 0)  # forwards of DenseNet's layers cannot be traced
    assert any(m.bias is not None for m in convolutions)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(x.double())
        assert_within_budget("logits", fused(x), model(x), exact, condition=8)


class OtherConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def hooked(which: str) -> nn.Module:
    model = Net(lambda p, x: p.norm(p.conv(x)), conv=plain(), norm=norm())
    model.parts[which].register_forward_hook(lambda module, args, output: output * 2)
    return model


def norm_subclass() -> nn.Module:

    class Stubborn(nn.BatchNorm2d):
        pass

    return nn.Sequential(plain(), stirred(Stubborn(CHANNELS)))


def weight_read_elsewhere() -> nn.Module:
    return Net(lambda p, x: p.norm(p.conv(x)) + F.conv2d(x, p.conv.weight, padding=1), conv=plain(), norm=norm())


def parametrized() -> nn.Module:
    conv = torch.nn.utils.parametrizations.weight_norm(plain())
    return Net(lambda p, x: p.norm(p.conv(x)), conv=conv, norm=norm())


KEPT: dict[str, Callable[[], nn.Module]] = {
    "a norm's weight read elsewhere": lambda: Net(
        lambda p, x: p.norm(p.conv(x)) * p.norm.weight.abs().sum(), conv=plain(), norm=norm()
    ),
    "a norm's buffer read elsewhere": lambda: Net(
        lambda p, x: p.norm(p.conv(x)) + p.norm.running_mean.mean(), conv=plain(), norm=norm()
    ),
    "a second reader": lambda: Net(lambda p, x: p.norm(y := p.conv(x)) + y, conv=plain(), norm=norm()),
    "a result of the network": lambda: Net(lambda p, x: (p.norm(y := p.conv(x)), y)[0] + y, conv=plain(), norm=norm()),
    "called twice": lambda: Net(lambda p, x: p.norm(p.conv(x)) + p.conv(x + 1), conv=plain(), norm=norm()),
    "a norm of two": lambda: Net(
        lambda p, x: p.norm(p.conv(x)) + p.norm(p.other(x)), conv=plain(), other=plain(), norm=norm()
    ),
    "an activation between": lambda: nn.Sequential(plain(), nn.ReLU(), norm()),
    "no running statistics": lambda: nn.Sequential(plain(), nn.BatchNorm2d(CHANNELS, track_running_stats=False)),
    "a subclass of the norm": norm_subclass,
    "a subclass of the convolution": lambda: nn.Sequential(OtherConv(CHANNELS, CHANNELS, 3), norm()),
    "a transposed convolution": lambda: nn.Sequential(nn.ConvTranspose2d(CHANNELS, CHANNELS, 3), norm()),
    "a hooked convolution": lambda: hooked("conv"),
    "a hooked norm": lambda: hooked("norm"),
    "a weight read elsewhere": weight_read_elsewhere,
    "a parametrized convolution": parametrized,
}


@pytest.mark.parametrize("name", KEPT)
def test_what_stays(name: str) -> None:
    model = KEPT[name]().eval()
    fused = check(model, 0)
    x = images()
    with torch.no_grad():
        assert torch.equal(fused(x), model(x))


def test_an_optional_argument_keeps_it() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = plain(), norm()

        def forward(self, x: Tensor, normed: bool = True) -> Tensor:
            y = self.conv(x)
            return self.norm(y) if normed else y

    model = Net(lambda p, x: p.part(x), part=Part()).eval()
    check(model, 0)


def test_a_norm_in_training_mode_stays() -> None:
    model = nn.Sequential(plain(), norm()).eval()
    model[1].train()
    reports: list[Fusion] = []
    fuse(model, plain_norms=True, report=reports.append)
    assert reports[0].norms == ()


def test_a_flag_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match=r"plain_norms must be True or False, got 'yes'"):
        fuse(nn.Sequential(plain(), norm()).eval(), plain_norms="yes")  # type: ignore[arg-type]


def test_the_report_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    fuse(nn.Sequential(layer(), plain(), norm()).eval(), plain_norms=True, report=print)
    assert "norms fold into plain convolutions:\n  1 <- 2" in capsys.readouterr().out
