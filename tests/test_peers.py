"""Each peer computes what its paper says, by another formulation of the same equations, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import assert_within_budget
from torch import Tensor, nn

from benchmarks.peers import (
    LAYERS,
    NAMES,
    NETWORKS,
    Ghost,
    GroupedShuffle,
    HetConv,
    Octaves,
    OctConv,
    PartialConv,
    Separable,
    build_layer,
    build_network,
)
from benchmarks.peers.catalogue import VARIANTS

WINDOWS = [(8, 16, 3, 1), (16, 8, 3, 2), (8, 8, 5, 1), (24, 16, 1, 2)]
"""(L, M, k, stride)."""

EAGER = [name for name in NAMES if not name.endswith(VARIANTS)]


def centre_tap(weight: Tensor, kernel_size: int) -> Tensor:
    """1 x 1 kernels as k x k ones."""
    around = kernel_size // 2
    return F.pad(weight, (around, around, around, around))


def dense_weight(layer: nn.Module, kernel_size: int) -> Tensor:
    """The k x k convolution that ``layer`` is, written out kernel by kernel."""
    match layer:
        case HetConv():
            share = layer.spatial.in_channels // layer.part
            rows = []
            for f in range(layer.spatial.out_channels):
                own = f // (layer.spatial.out_channels // layer.part) * share
                kernels = list(centre_tap(layer.weight_pointwise[f, :, None, None, None], kernel_size).squeeze(1))
                kernels[own:own] = layer.spatial.weight[f]
                rows.append(torch.stack(kernels))
            return torch.stack(rows)
        case Ghost():
            primary = layer.primary.weight
            return torch.cat((primary, primary))[: layer.out_channels]
        case Separable():
            return layer.pointwise.weight * layer.depthwise.weight.squeeze(1)
        case GroupedShuffle():
            groups, share = layer.conv.groups, layer.conv.weight.shape[1]
            per_group = layer.conv.out_channels // groups
            rows = []
            for c in range(layer.conv.out_channels):
                group, position = c % groups, c // groups
                kernels = layer.conv.weight[group * per_group + position]
                rows.append(F.pad(kernels, (0, 0, 0, 0, group * share, (groups - 1 - group) * share)))
            return torch.stack(rows)
        case PartialConv():
            pointwise = layer.pointwise.weight
            mixed = torch.einsum("mcij,clkh->mlkh", pointwise[:, : layer.convolved], layer.partial.weight)
            return torch.cat((mixed, centre_tap(pointwise[:, layer.convolved :], kernel_size)), 1)
    raise AssertionError(layer)


def expected(layer: nn.Module, x: Tensor, kernel_size: int, stride: int) -> Tensor:
    y = F.conv2d(x, dense_weight(layer, kernel_size), None, stride, kernel_size // 2)
    if not isinstance(layer, Ghost):
        return y
    intrinsic = layer.primary.out_channels
    ghosts = [F.conv2d(y[:, i : i + 1], layer.cheap.weight[i : i + 1], padding=1) for i in range(intrinsic)]
    return torch.cat((y[:, :intrinsic], *ghosts), 1)[:, : layer.out_channels]


def assert_same(layer: nn.Module, x: Tensor, got: Tensor, judge: Tensor) -> None:
    """In float64, with every gradient."""
    leaves = {"x": x, **dict(layer.named_parameters())}
    assert_within_budget("y", got, judge, judge)
    grad = torch.randn_like(judge)
    ours, theirs = (torch.autograd.grad(y, list(leaves.values()), grad) for y in (got, judge))
    for name, own, other in zip(leaves, ours, theirs, strict=True):
        assert_within_budget(name, own, other, other, condition=4)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("name", ["ghost", "hetconv-p4", "hetconv-p8", "separable", "shuffle", "pconv"])
def test_peer_is_the_dense_convolution_that_its_paper_draws(name: str, window: tuple[int, int, int, int]) -> None:
    _, _, kernel_size, stride = window
    layer = build_layer(name, *window).double()
    x = torch.randn(2, window[0], 9, 6, dtype=torch.float64, requires_grad=True)
    assert_same(layer, x, layer(x), expected(layer, x, kernel_size, stride))


@pytest.mark.parametrize("out_channels", [7, 9])
def test_ghosts_of_which_some_are_too_many(out_channels: int) -> None:
    layer = Ghost(4, out_channels, ratio=3).double()
    assert layer(torch.randn(1, 4, 5, 5, dtype=torch.float64)).shape == (1, out_channels, 5, 5)
    assert layer.primary.out_channels == 3


def test_ghost_with_its_norms_is_timms() -> None:
    """Ours and the norm and ReLU that follow it in a network; timm's has them inside."""
    timm = pytest.importorskip("timm.models.ghostnet")
    theirs = timm.GhostModule(8, 12, kernel_size=3, stride=2).double().train()
    ours = Ghost(8, 12, 3, 2, norm=True).double()
    ours.primary.load_state_dict(theirs.primary_conv[0].state_dict())
    ours.cheap.load_state_dict(theirs.cheap_operation[0].state_dict())
    x = torch.randn(3, 8, 7, 8, dtype=torch.float64)
    y = nn.BatchNorm2d(12).double()(ours(x)).relu()
    judge = theirs(x)
    assert_within_budget("y", y, judge, judge, condition=4)


def test_hetconv_weights_are_never_stale() -> None:
    layer = HetConv(8, 8).eval()
    x = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        before = layer(x)
        layer.weight_pointwise.mul_(2)
        changed = layer(x)
        layer.load_state_dict({name: 3 * value for name, value in layer.state_dict().items()})
        loaded = layer(x)
    assert not torch.equal(before, changed)
    torch.testing.assert_close(loaded, layer(x).detach())


def test_octave_of_one_resolution_is_a_plain_convolution() -> None:
    layer = OctConv(6, 4, alpha_in=0.0, alpha_out=0.0).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    assert_same(layer, x, layer(x), F.conv2d(x, layer.high_to_high.weight, padding=1))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("alpha_in", "alpha_out"), [(0.5, 0.5), (0.25, 0.75), (0.0, 0.5), (0.5, 0.0)])
def test_octave_is_one_convolution_of_both_resolutions(alpha_in: float, alpha_out: float, stride: int) -> None:
    """With k = 1 it is one matrix, applied to all maps at full resolution of the output for Y_H, and at half of it."""
    channels, filters = 8, 12
    layer = OctConv(channels, filters, 1, stride, alpha_in=alpha_in, alpha_out=alpha_out).double()
    low_in, low_out = int(alpha_in * channels), int(alpha_out * filters)
    high = torch.randn(2, channels - low_in, 8, 12, dtype=torch.float64)
    low = torch.randn(2, low_in, 4, 6, dtype=torch.float64)
    y = layer(Octaves(high, low) if low_in else high)

    def halved(x: Tensor) -> Tensor:
        return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))

    def matrix(way: nn.Conv2d | None, rows: int, columns: int) -> Tensor:
        return torch.zeros(rows, columns, dtype=torch.float64) if way is None else way.weight[:, :, 0, 0]

    high_in, high_out = channels - low_in, filters - low_out
    ways = [
        [matrix(layer.high_to_high, high_out, high_in), matrix(layer.low_to_high, high_out, low_in)],
        [matrix(layer.high_to_low, low_out, high_in), matrix(layer.low_to_low, low_out, low_in)],
    ]
    weight = torch.cat([torch.cat(row, 1) for row in ways])
    if stride == 1:
        full = torch.cat((high, low.repeat_interleave(2, 2).repeat_interleave(2, 3)), 1)
        half = torch.cat((halved(high), low), 1)
    else:
        full = torch.cat((halved(high), low), 1)
        half = torch.cat((halved(halved(high)), halved(low)), 1)
    exact_high = torch.einsum("ml,nlhw->nmhw", weight, full)[:, :high_out]
    exact_low = torch.einsum("ml,nlhw->nmhw", weight, half)[:, high_out:]
    if not low_out:
        assert_within_budget("high", y, exact_high, exact_high)
        return
    assert_within_budget("high", y.high, exact_high, exact_high)
    assert_within_budget("low", y.low, exact_low, exact_low)


def test_octave_with_its_spatial_kernels() -> None:
    """k = 3: each way by itself, the other weights being zero."""
    high, low = torch.randn(1, 4, 7, 6, dtype=torch.float64), torch.randn(1, 4, 4, 3, dtype=torch.float64)
    for way in ("high_to_high", "high_to_low", "low_to_high", "low_to_low"):
        layer = OctConv(8, 8).double()
        for name, weight in layer.named_parameters():
            if not name.startswith(f"{way}."):
                nn.init.zeros_(weight)
        weight = layer.get_submodule(way).weight
        source = {"high_to_high": high, "high_to_low": F.avg_pool2d(high, 2, ceil_mode=True)}.get(way, low)
        there = F.conv2d(source, weight, padding=1)
        if way == "low_to_high":
            there = there.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :7]
        y = layer(Octaves(high, low))
        got, other = (y.high, y.low) if way.endswith("high") else (y.low, y.high)
        assert_within_budget(way, got, there, there)
        assert not other.any(), way


@pytest.mark.parametrize("name", EAGER)
def test_layers_keep_size_and_layout(name: str) -> None:
    for stride, size in ((1, (9, 6)), (2, (5, 3))):
        layer = build_layer(name, 16, 24, 3, stride).to(memory_format=torch.channels_last)
        x = torch.randn(2, 16, 9, 6).to(memory_format=torch.channels_last)
        if name == "octconv":
            y = layer(Octaves(x[:, :8], F.avg_pool2d(x[:, 8:], 2, ceil_mode=True)))
            assert y.low.shape == (2, 12, (size[0] + 1) // 2, (size[1] + 1) // 2)
            y = torch.cat((y.high, y.high), 1)
        assert y.shape == (2, 24, *size) if name == "octconv" else layer(x).shape == (2, 24, *size)
        if name != "octconv":
            assert layer(x).is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize("name", [n for n in EAGER if n not in ("conv2d", "reference", "spconv")])
@pytest.mark.parametrize("network", [n for n in NETWORKS if n != "resnet50"])
def test_networks_learn(network: str, name: str) -> None:
    model = build_network(network, name, in_channels=1)
    y = model(torch.randn(2, 1, 32, 32))
    assert y.shape == (2, 10)
    y.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_resnet50_of_octaves_runs() -> None:
    with torch.inference_mode():
        assert build_network("resnet50", "octconv").eval()(torch.randn(1, 3, 64, 64)).shape == (1, 10)


def test_names_of_variants_are_the_eager_layers() -> None:
    compiled = {f"{name} compiled" for name in ("conv2d", "spconv", "reference", "ghost")}
    assert set(NAMES) - set(LAYERS) == {*compiled, "spconv kept"}
    assert type(build_layer("spconv kept", 8, 8)) is type(build_layer("spconv", 8, 8))
    assert type(build_layer("reference compiled", 8, 8)) is type(build_layer("reference", 8, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HetConv(6, 8), "part must divide in_channels=6, got 4"),
        (lambda: HetConv(8, 6), "part must divide out_channels=6, got 4"),
        (lambda: Separable(8, 8, 4), "kernel_size must be odd, got 4"),
        (lambda: OctConv(8, 8, 3, 3), "stride must be 1 or 2, got 3"),
    ],
)
def test_errors(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
