"""The weights that a layer starts with: of the variance of nn.Conv2d's, and the gate at one half."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import make, state_of
from torch import Tensor, nn

from spconv_triton import SPConv2d, reference

INITIAL = {
    "defaults": {},
    "quarter": {"alpha": 0.25},
    "all": {"alpha": 1},
    "four-groups": {"groups": 4, "alpha": 0.5},
    "one-group": {"groups": 1},
    "stride-2": {"stride": 2},
    "stride-2-quarter": {"stride": 2, "alpha": 0.25, "groups": 4},
    "k5": {"kernel_size": 5},
}


@pytest.mark.parametrize("options", list(INITIAL.values()), ids=list(INITIAL))
def test_initial_variance_is_that_of_conv2d(options: dict[str, Any]) -> None:
    """Within five standard errors over fresh layers, each on white noise of its own; no padding, so no border."""
    shared = {"kernel_size": 3, "bias": False, **options}
    plain = {k: v for k, v in shared.items() if k not in ("alpha", "groups")}

    def variances(build: Any) -> Tensor:
        return torch.stack([build()(torch.randn(4, 32, 15, 15)).var() for _ in range(64)])

    with torch.no_grad():
        ours = variances(lambda: SPConv2d(32, 32, **shared))
        theirs = variances(lambda: nn.Conv2d(32, 32, **plain))
    error = ((ours.var() + theirs.var()) / 64).sqrt()
    assert error < 0.02 * theirs.mean(), "the sample is too small to tell"
    assert (ours.mean() - theirs.mean()).abs() < 5 * error, f"{ours.mean()} against {theirs.mean()}, error {error}"


def test_initial_bias_is_that_of_conv2d() -> None:
    biases = torch.cat([SPConv2d(8, 64, 3).bias.detach() for _ in range(64)])
    bound = (8 * 9) ** -0.5
    assert biases.abs().max() <= bound
    assert biases.abs().max() > 0.99 * bound
    assert biases.mean().abs() < 5 * bound / (3 * biases.numel()) ** 0.5


def test_gate_starts_at_one_half() -> None:
    """On average over layers, samples and channels, within five standard errors."""
    means = []
    with torch.no_grad():
        for _ in range(64):
            layer = SPConv2d(16, 16, 3, bias=False)
            x = torch.randn(2, 16, 12, 12)
            u3 = reference.representative_branch(x[:, :8], layer.weight_gwc, layer.weight_pwc)
            u1 = F.conv2d(x[:, 8:, 1:-1, 1:-1], layer.weight_redundant)
            means.append(torch.sigmoid(u3.mean((2, 3)) - u1.mean((2, 3))).mean())
    beta = torch.stack(means)
    error = beta.std() / 8
    assert 0 < error < 0.01
    assert (beta.mean() - 0.5).abs() < 5 * error


def test_reset_parameters_draws_anew_and_resets_norms() -> None:
    layer = make({"kernel_size": 3, "padding": 1}, branch_norm=True)
    layer(torch.randn(4, 8, 5, 5) + 3)
    before = state_of(layer)
    layer.reset_parameters()
    for name in ("weight_gwc", "weight_pwc", "weight_redundant", "bias"):
        assert not torch.equal(layer.state_dict()[name], before[name]), name
    for norm in (layer.norm_representative, layer.norm_redundant):
        assert not norm.running_mean.any()
        assert (norm.running_var == 1).all()
        assert norm.num_batches_tracked == 0


def test_initial_bound_at_an_uneven_stride() -> None:
    layer = SPConv2d(64, 64, 3, stride=(1, 2))
    bound = 2 / (9 * 32 / 2 + 64 / 2) ** 0.5
    assert 0.99 * bound < layer.weight_gwc.abs().max() <= bound


def test_reset_parameters_after_an_assigned_window() -> None:
    """Attributes may be assigned as those of ``nn.Conv2d`` may."""
    layer = SPConv2d(8, 8, 3)
    layer.stride, layer.kernel_size = 2, 3
    layer.reset_parameters()
    assert 0 < layer.weight_pwc.abs().max() <= 2 / math.sqrt(9 * 4 / 2 + 8 / 4)
