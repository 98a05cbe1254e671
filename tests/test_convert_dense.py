"""convert: weights from those of the dense convolution."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spconv_triton import convert
from spconv_triton.dense import split_weights
from spconv_triton.geometry import Geometry


def test_default_weights_are_drawn() -> None:
    torch.manual_seed(0)
    drawn = convert(nn.Conv2d(16, 16, 3))
    assert drawn.weight_pwc.std() > 0.03
    torch.manual_seed(1)
    state = torch.get_rng_state()
    convert(nn.Conv2d(16, 16, 3, device="meta"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_dense_weights_are_least_squares(stride, dilation, correlation) -> None:
    """Against a solver that knows only the assumed covariance of the pixels under a window."""
    M, L, representative, G, k = 6, 10, 4, 2, (5, 3)
    weight = torch.randn(M, L, *k, dtype=torch.float64)
    geometry = Geometry(k, stride, (0, 0), dilation, G)
    got = split_weights(weight, representative, geometry, correlation)

    # Every pixel that a window or its mean sees, as (row, column) from the centre tap.
    taps = [((i - 2) * dilation[0], (j - 1) * dilation[1]) for i in range(k[0]) for j in range(k[1])]
    window = [(i, j) for i in range(stride[0]) for j in range(stride[1])]
    pixels = sorted({*taps, *window})
    covariance = torch.tensor(
        [[correlation ** (abs(a[0] - b[0]) + abs(a[1] - b[1])) for b in pixels] for a in pixels], dtype=torch.float64
    )
    root = torch.linalg.cholesky(covariance)
    mean = torch.tensor([float(p in window) / len(window) for p in pixels], dtype=torch.float64)
    for m in range(M):
        for channel in range(L):
            dense = torch.zeros(len(pixels), dtype=torch.float64)
            for value, tap in zip(weight[m, channel].flatten(), taps, strict=True):
                dense[pixels.index(tap)] = value
            best = 2 * torch.linalg.lstsq((root.T @ mean)[:, None], (root.T @ dense)[:, None]).solution.item()
            if channel >= representative:
                assert got.redundant[m, channel - representative].item() == pytest.approx(best, abs=1e-10)
            elif channel // (representative // G) == m // (M // G):
                torch.testing.assert_close(got.gwc[m, channel % (representative // G)], 2 * weight[m, channel])
                assert got.pwc[m, channel].item() == 0
            else:
                assert got.pwc[m, channel].item() == pytest.approx(best, abs=1e-10)


def test_dense_weights_in_low_precision_and_on_meta() -> None:
    conv = nn.Conv2d(16, 8, 3, dtype=torch.bfloat16)
    layer = convert(conv, init="dense")
    exact = split_weights(conv.weight.double(), 8, layer.geometry)
    for name, weight in exact._asdict().items():
        error = (getattr(layer, f"weight_{name}").double() - weight).abs().max() / weight.abs().max()
        assert error <= torch.finfo(torch.bfloat16).eps
    assert convert(nn.Conv2d(16, 8, 3, device="meta"), init="dense").weight_gwc.is_meta


def smooth(*shape: int) -> torch.Tensor:
    """Random maps, non-negative and smooth as those behind a ReLU are."""
    x = nn.functional.interpolate(torch.randn(*shape[:2], shape[2] // 4, shape[3] // 4), shape[2:], mode="bicubic")
    return x.relu()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("alpha", [0.5, 0.25, 1.0])
def test_a_dense_start_is_closer_to_the_convolution(stride: int, alpha: float) -> None:
    conv = nn.Conv2d(32, 32, 3, stride=stride, padding=1)
    x = smooth(4, 32, 24, 24)
    with torch.no_grad():
        y = conv(x)
        error = {
            init: ((convert(copy.deepcopy(conv), alpha, init=init)(x) - y).norm() / y.norm()).item()
            for init in ("default", "dense")
        }
    assert error["dense"] < 0.75 < error["default"]
