"""The summary's numbers are those of the equations, and taking it changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import run_python
from torch import nn

from spconv_triton import SPConv2d, convert, fuse, models, summary
from spconv_triton.network_summary import Costs, Summary, summarize


class Small(nn.Module):
    """One convolution called twice, one never, a transposed and a linear layer, attention without a module call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.twice = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.never = nn.Conv2d(16, 32, 5)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.twice(self.twice(self.stem(x))))
        x = self.up(input=self.drop(x)).flatten(2)
        return self.head((x @ x.transpose(1, 2)).softmax(2) @ x.mean(2, keepdim=True).expand(-1, -1, 8))


# Multiply-accumulates at [2, 3, 6, 5]: 60 pixels before the transposed convolution, 240 behind it.
STEM, TWICE, UP = 60 * 16 * 27, 2 * 60 * 16 * 144, 60 * 16 * 32
OTHERS = 240 * 8 * 8 + 2 * 8 * 8 * 8 + 2 * 8 * 8 * 4  # the matrix products and the linear layer
SPLIT = 2 * 60 * 16 * (9 * 8 // 2 + 16)


def rows(found: Summary) -> dict[str, tuple[Any, ...]]:
    return {r.names[0]: (r.costs, r.is_spconv, r.reason) for r in found.rows}


def test_costs() -> None:
    found = summarize(Small(), (2, 3, 6, 5))
    assert rows(found) == {
        "stem": (Costs(448, 448, STEM, STEM), False, "has 3 input channels, fewer than min_channels=8"),
        "twice": (Costs(2304, 2304, TWICE, TWICE), False, ""),
        "never": (Costs(12832, 12832, 0, 0), False, ""),
        "up": (Costs(520, 520, UP, UP), False, "is a transposed convolution"),
    }
    parameters = 448 + 2304 + 32 + 12832 + 520 + 36
    macs = STEM + TWICE + UP + OTHERS
    assert found.total == Costs(parameters, parameters, macs, macs)


def test_costs_of_a_converted_network() -> None:
    found = summarize(convert(Small()), (2, 3, 6, 5))
    never = 25 * 8 * 32 // 2 + 16 * 32 + 32
    assert rows(found)["twice"] == (Costs(2304, 832, TWICE, SPLIT), True, "")
    assert rows(found)["never"] == (Costs(12832, never, 0, 0), True, "")
    saved = 2304 - 832 + 12832 - never
    before = summarize(Small(), (2, 3, 6, 5)).total
    assert found.total == Costs(
        before.parameters_before,
        before.parameters_before - saved,
        before.macs_before,
        before.macs_before + SPLIT - TWICE,
    )


@pytest.mark.parametrize("branch_norm", [False, True])
@pytest.mark.parametrize(("alpha", "groups"), [(0.5, 2), (0.25, 4), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding_mode": "circular"}, {"bias": False}], ids=str)
def test_one_layer(alpha: float, groups: int, branch_norm: bool, options: dict[str, Any]) -> None:
    conv = nn.Conv2d(16, 12, 3, padding=1, **options)
    layer = convert(copy.deepcopy(conv), alpha, groups, branch_norm=branch_norm)
    found = summarize(layer, (2, 16, 7, 6))
    pixels = 2 * (4 * 3 if "stride" in options else 7 * 6)
    assert found.total == found.rows[0].costs
    assert found.total.parameters_before == sum(p.numel() for p in conv.parameters())
    assert found.total.parameters_after == sum(p.numel() for p in layer.parameters())
    assert found.total.macs_before == pixels * 12 * 16 * 9
    assert found.total.macs_after == pixels * 12 * (9 * 16 * alpha / groups + 16)


@pytest.mark.parametrize("alpha", [1 / 2, 1 / 4])
def test_it_agrees_with_the_published_networks(alpha: float) -> None:
    """Building with SPConv and converting the vanilla network are the same network."""
    with torch.device("meta"):
        built = models.resnet20(alpha)
        converted = convert(models.resnet20(), alpha, branch_norm=True)
        vanilla = models.resnet20()
    shape = (1, 3, 32, 32)
    assert summarize(converted, shape) == summarize(built, shape)
    dense = summarize(vanilla, shape).total
    total = summarize(built, shape).total
    assert (total.parameters_before, total.macs_before) == (dense.parameters_after, dense.macs_after)


def test_it_prints_what_it_returns(capsys: pytest.CaptureFixture[str]) -> None:
    model = convert(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1)), include="1")
    found = summary(model, (1, 3, 8, 8))
    lines = capsys.readouterr().out.splitlines()
    assert "\n".join(lines) == str(found)
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "0 448 448 1.00 15,552 15,552 1.00 has 3 input channels, fewer than min_channels=8",
        "1 2,320 848 0.37 36,864 13,312 0.36 SPConv2d",
        "2 272 272 1.00 4,096 4,096 1.00 is 1 x 1",
        "whole network 3,040 1,568 0.52 56,512 32,960 0.58",
    ]
    assert "could be an SPConv2d" in str(summarize(nn.Conv2d(16, 16, 3), (1, 16, 8, 8)))


def test_it_changes_nothing() -> None:
    model = convert(Small(), branch_norm=True)
    model.twice.eval()
    fired: list[str] = []
    model.twice.register_forward_hook(lambda *_: fired.append("hook"))
    state = copy.deepcopy(model.state_dict())
    flags = {name: m.training for name, m in model.named_modules()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    generator = torch.get_rng_state()
    x = torch.randn(2, 3, 6, 5, requires_grad=True)
    torch.set_rng_state(generator)
    summarize(model, x)
    assert torch.equal(torch.get_rng_state(), generator)
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert fired == ["hook", "hook"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())


class Restless(nn.Module):
    """Draws numbers and counts its calls even in eval mode, and has its own idea of what ``train`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)
        self.calls = nn.Buffer(torch.zeros((), dtype=torch.long))
        self.switches = 0

    def train(self, mode: bool = True) -> Restless:
        self.switches += 1
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not any(module.training for module in self.modules())
        self.calls += 1
        return self.conv(x + torch.rand(x.shape))


def test_it_undoes_what_the_network_does() -> None:
    model = Restless()
    state = torch.get_rng_state()
    summarize(model, (1, 8, 5, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 0
    assert model.switches == 0
    assert model.training


def test_it_leaves_the_model_alone_after_an_error() -> None:
    model = Small()
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        summarize(model, (1, 4, 6, 6))
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_inputs_that_it_takes() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)

        def forward(self, images: list[torch.Tensor], extra: torch.Tensor | None = None) -> torch.Tensor:
            assert isinstance(images, list), images
            assert extra is None or (extra.shape == (4, 2) and not extra.any())
            return torch.stack([self.conv(image[None]) for image in images])

    image = torch.zeros(8, 5, 5)
    macs = 3 * 3 * 8 * 8 * 9
    assert summarize(Two(), ([image, image],)).total.macs_after == 2 * macs
    assert summarize(Two(), [image]).total.macs_after == macs
    assert summarize(Two(), ([image], (4, 2))).total.macs_after == macs
    assert summarize(Two(), ([image], torch.zeros(4, 2))).total.macs_after == macs
    conv = nn.Conv2d(8, 8, 3, dtype=torch.float64)
    for given in ((1, 8, 5, 5), [1, 8, 5, 5], torch.Size([1, 8, 5, 5]), torch.zeros(1, 8, 5, 5).double()):
        assert summarize(conv, given).total.macs_after == macs


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        ("resnet20", (1, 3, 8, 8), TypeError, "model must be a torch.nn.Module, got str"),
        (nn.Conv2d(8, 8, 3), (), ValueError, "input_size must be a shape such as (1, 3, 224, 224), or inputs, got ()"),
        (nn.Conv2d(8, 8, 3), (1, 8, -5, 5), ValueError, "got (1, 8, -5, 5)"),
        ("scripted", (1, 3, 8, 8), ValueError, "model must not be scripted"),
    ],
    ids=["model", "empty", "negative", "scripted"],
)
def test_what_it_refuses(model: Any, given: Any, error: type[Exception], message: str) -> None:
    if model == "scripted":
        model = torch.jit.trace(nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8))
    with pytest.raises(error) as caught:
        summarize(model, given)
    assert message in str(caught.value)


class Doubled(nn.Module):
    """A forward that is not PyTorch's own: before 2.14, compiling one of those in place compiles nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_wrapped_and_compiled_models() -> None:
    expected = summarize(Small(), (2, 3, 6, 5))
    compiled_times: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Any:
        compiled_times.append(1)
        return graph

    inside = Small()
    inside.drop = Doubled()
    inside.drop.compile(backend=backend)
    for model in (torch.compile(Small(), backend=backend), nn.DataParallel(Small()), inside):
        assert summarize(model, (2, 3, 6, 5)) == expected
    assert compiled_times == []
    inside(torch.zeros(2, 3, 6, 5))
    assert compiled_times


def test_computed_weights_and_subclasses() -> None:
    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), Own(8, 8, 3))
    found = summarize(model, (1, 8, 9, 9))
    assert [r.costs.macs_after for r in found.rows] == [49 * 8 * 72, 25 * 8 * 72]
    assert [r.costs.parameters_after for r in found.rows] == [8 * 72 + 8 + 8, 8 * 72 + 8]
    assert all(r.reason for r in found.rows)


def test_it_needs_no_rich(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["rich"] = None
import torch, spconv_triton
spconv_triton.summary(spconv_triton.convert(torch.nn.Conv2d(8, 8, 3)), (1, 8, 5, 5))
"""
    assert run_python(code, tmp_path).splitlines()[-1].startswith("whole network")


def test_a_meta_model() -> None:
    with torch.device("meta"):
        model = models.resnet50()
    before = summarize(model, (1, 3, 224, 224)).total
    after = summarize(convert(model), (1, 3, 224, 224)).total
    assert after.macs_before == before.macs_after
    assert sum(isinstance(m, SPConv2d) for m in model.modules()) == 16
    # 3.25 L M instead of 9 L M at each pixel of the 16 layers, which cost 115,605,504 each.
    assert before.macs_after - after.macs_after == 16 * 115_605_504 * 23 // 36


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"alpha": 1.0}, {"branch_norm": True}], ids=str)
def test_a_fused_layer_costs_what_it_did(options: dict[str, Any]) -> None:
    """Apart from the norms, whose numbers went into its weights and a bias that it may not have had."""
    model = nn.Sequential(SPConv2d(8, 12, 3, padding=1, **options), nn.ReLU(), nn.Conv2d(12, 4, 1)).eval()
    before, after = summarize(model, (2, 8, 7, 5)), summarize(fuse(model), (2, 8, 7, 5))
    assert [row.is_spconv for row in after.rows] == [True, False]
    assert (after.total.macs_before, after.total.macs_after) == (before.total.macs_before, before.total.macs_after)
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert after.total.parameters_after == before.total.parameters_after - norms
    assert after.rows[0].costs.parameters_before == 12 * (8 * 9 + options.get("bias", True))


def test_convolutions_with_assigned_attributes_and_named_inputs() -> None:
    """They run, and ``convert`` takes them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv2d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1)
            self.conv.padding = self.conv.dilation = 1
            self.conv.kernel_size = 3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(output_size=[10, 10], input=self.conv(x))

    found = summarize(Net(), (1, 8, 5, 5))
    assert [row.costs.macs_after for row in found.rows] == [25 * 9 * 64, 25 * 9 * 32]
    assert found.rows[0].layer == "Conv2d(8, 8)"
