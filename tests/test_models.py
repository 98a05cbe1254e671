"""The paper's networks have the paper's sizes, and SPConv stands where the paper puts it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import nn

from docs.tables import PAPER, TITLES, networks_table, total
from spconv_triton import SPConv2d, models
from spconv_triton.training.measure import count_macs, count_parameters

# All but VGG-16's vanilla column, which is tested on its own below.
pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED = [
    (name, Fraction(alpha), parameters)
    for (name, alpha), (parameters, _, _) in PAPER.items()
    if (name, alpha) != ("vgg16", "0")
]


def on_meta(name: str, alpha: float | None, **options: object) -> nn.Module:
    with torch.device("meta"):
        return models.MODELS[name](alpha, **options)


@pytest.mark.parametrize("name", models.MODELS)
def test_published_table(name: str) -> None:
    """The README has the table that this prints, so it says by how much each published count is missed."""
    table = networks_table(name)
    print(f"\n{TITLES[name]}\n\n{table}")
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert table in readme, "README has another table: see what python -m pytest -s prints"


@pytest.mark.parametrize(("name", "alpha", "millions"), PUBLISHED, ids=str)
def test_parameters_are_the_published_ones(name: str, alpha: Fraction, millions: str) -> None:
    decimals = len(millions.partition(".")[2])
    assert f"{total(name, alpha)[0] / 1e6:.{decimals}f}" == millions


def test_published_vanilla_vgg16_has_a_pointwise_beside_each_convolution() -> None:
    vanilla = on_meta("vgg16", None)
    pointwise = sum(
        m.in_channels * m.out_channels for m in vanilla.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 3
    )
    assert f"{count_parameters(vanilla) / 1e6:.2f}" == "14.99"
    assert f"{(count_parameters(vanilla) + pointwise) / 1e6:.2f}" == "16.62"


def test_published_count_of_resnet20_is_macs_and_four_per_normed_element() -> None:
    network = models.resnet20()
    macs = count_macs(network, (1, 3, 32, 32))
    normed = 0

    def count(_module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        nonlocal normed
        normed += inputs[0].numel()

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(count)
    network(torch.zeros(1, 3, 32, 32))
    assert f"{(macs + 4 * normed) / 1e6:.2f}" == "41.62"


@pytest.mark.parametrize(("alpha", "per_position"), [(1 / 2, 3.25), (1 / 4, 2.125)])
def test_macs_of_spconv_follow_the_equations(alpha: float, per_position: float) -> None:
    """k^2 alpha L M / G + L M per output position, for the 18 replaced convolutions."""
    first, stage_1 = 3 * 16 * 9 * 32**2, 6 * 16 * 16 * 32**2
    stage_2, stage_3 = (16 * 32 + 5 * 32 * 32) * 16**2, (32 * 64 + 5 * 64 * 64) * 8**2
    shortcuts, linear = 16 * 32 * 16**2 + 32 * 64 * 8**2, 64 * 10
    expected = first + per_position * (stage_1 + stage_2 + stage_3) + shortcuts + linear
    assert count_macs(models.resnet20(alpha), (1, 3, 32, 32)) == expected


@pytest.mark.parametrize("name", models.MODELS)
def test_what_is_replaced(name: str) -> None:
    vanilla, split = on_meta(name, None), on_meta(name, 0.5)
    assert not any(isinstance(m, SPConv2d) for m in vanilla.modules())
    convolutions = {k: m for k, m in vanilla.named_modules() if isinstance(m, nn.Conv2d)}
    replaced = {k for k, m in split.named_modules() if isinstance(m, SPConv2d)}
    assert replaced == {k for k, m in convolutions.items() if m.kernel_size == (3, 3) and m.in_channels > 3}
    for key in replaced:
        dense, layer = convolutions[key], split.get_submodule(key)
        for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "padding"):
            assert getattr(layer, attribute) == getattr(dense, attribute), (key, attribute)


def test_vanilla_resnet50_is_torchvisions() -> None:
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet50(num_classes=7).eval()
    ours = models.resnet50(classes=7).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 48)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), msg=lambda m: f"resnet50 differs from torchvision's: {m}")


@pytest.mark.parametrize("branch_norm", [True, False])
@pytest.mark.parametrize(("name", "size"), [("resnet20", (13, 10)), ("resnet50", (33, 40)), ("vgg16", (32, 35))])
def test_every_parameter_learns(name: str, size: tuple[int, int], branch_norm: bool) -> None:
    network = models.MODELS[name](0.25, classes=5, in_channels=2, branch_norm=branch_norm)
    norms = [m.branch_norm for m in network.modules() if isinstance(m, SPConv2d)]
    assert norms
    assert set(norms) == {branch_norm}
    y = network(torch.randn(3, 2, *size).to(memory_format=torch.channels_last))
    assert y.shape == (3, 5)
    y.square().mean().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any() or key.endswith("bias"), key


@pytest.mark.parametrize(
    ("channels", "alpha", "groups", "expected"),
    [
        (16, 1 / 2, 2, 8),
        (16, 1 / 8, 2, 2),
        (16, 1 / 16, 2, 2),  # 1 channel cannot be had with two groups
        (16, 0.01, 4, 4),
        (16, 0.34, 2, 4),  # 5
        (16, 1, 2, 16),
        (64, 1 / 16, 2, 4),
        (44, 31.5 / 44, 2, 30),  # the float nearest to 30 / 44 is below it
    ],
)
def test_legal_alpha(channels: int, alpha: float, groups: int, expected: int) -> None:
    legal = models.legal_alpha(channels, alpha, groups)
    assert SPConv2d(channels, 8, 3, groups=groups, alpha=legal).representative_channels == expected
    if int(channels * alpha) == expected:
        assert legal == alpha


def test_ratios_too_small_for_the_narrow_layers() -> None:
    layers = [m for m in on_meta("resnet20", 1 / 16).modules() if isinstance(m, SPConv2d)]
    assert [m.representative_channels for m in layers] == [2] * 13 + [4] * 5


@pytest.mark.parametrize("alpha", [0, -0.5, 1.5, float("nan")])
def test_alpha_outside_its_range(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\], got"):
        models.resnet20(alpha)


@pytest.mark.parametrize(("groups", "message"), [(3, "groups must divide out_channels=16"), (0, "groups must be")])
def test_groups_that_do_not_fit(groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.resnet20(0.5, groups=groups)


def test_backend_reaches_every_layer() -> None:
    network = on_meta("resnet20", 0.5, backend="reference")
    assert {m.backend for m in network.modules() if isinstance(m, SPConv2d)} == {"reference"}
