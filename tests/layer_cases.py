"""Layers that a property must not depend on, and the convolutions that they replace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Inputs, assert_within_budget, run
from torch import Tensor, nn

from spconv_triton import SPConv2d, reference

# Constructor arguments that every test of a property that must not depend on them goes through.
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3, "padding": 1},
    "bare": {"kernel_size": 3, "bias": False},
    "stride-2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "same": {"kernel_size": (5, 3), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": (1, 3), "padding": "valid", "groups": 1},
    "quarter": {"kernel_size": 3, "alpha": 0.25, "padding": (0, 1)},
    "all": {"kernel_size": 3, "alpha": 1.0, "groups": 4},
    "reflect": {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "reflect"},
    "branch-norm": {"kernel_size": 3, "padding": 1, "branch_norm": True},
    "branch-norm-all": {"kernel_size": 3, "padding": 1, "alpha": 1, "branch_norm": True},
}
every_layer = pytest.mark.parametrize("options", list(LAYERS.values()), ids=list(LAYERS))
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
every_format = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)


def make(options: dict[str, Any], **more: Any) -> SPConv2d:
    return SPConv2d(8, 12, **{**options, **more})


def dense(options: dict[str, Any], **more: Any) -> nn.Conv2d:
    """The nn.Conv2d that a layer replaces."""
    shared = {k: v for k, v in options.items() if k not in ("alpha", "branch_norm", "groups")}
    return nn.Conv2d(8, 12, **{**shared, **more})


def inputs_of(layer: SPConv2d, x: Tensor) -> Inputs:
    """A layer without padding mode or norms, as the arguments of the reference."""
    window = {
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
    }
    leaves = [layer.weight_gwc, layer.weight_pwc, layer.weight_redundant, layer.bias]
    return Inputs(x, *leaves, window=window)


def assert_as_reference(layer: SPConv2d, x: Tensor) -> None:
    inputs = inputs_of(layer, x)
    assert_within_budget(
        "y", layer(x), run(reference.spconv2d, inputs)["y"], run(reference.spconv2d, inputs.to(torch.float64))["y"]
    )


def state_of(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}
