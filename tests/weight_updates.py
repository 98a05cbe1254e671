"""Every way in which weights change under a layer that has already run."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from spconv_triton import SPConv2d

Update = Callable[[SPConv2d], None]


def in_place(layer: SPConv2d) -> None:
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(-0.5)


def behind_the_version_counter(layer: SPConv2d) -> None:
    for weight in layer.parameters():
        weight.data.add_(0.1)


def load_state_dict(layer: SPConv2d) -> None:
    state = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
    layer.load_state_dict(state)


def assigned_state_dict(layer: SPConv2d) -> None:
    state = {name: torch.randn(value.shape, device=value.device) for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def to_and_back(layer: SPConv2d) -> None:
    layer.to(torch.bfloat16).to(torch.float32)


def optimizer_step(layer: SPConv2d) -> None:
    for weight in layer.parameters():
        weight.grad = torch.randn_like(weight)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    layer.zero_grad()


def new_parameter(layer: SPConv2d) -> None:
    layer.weight_pwc = torch.nn.Parameter(torch.randn_like(layer.weight_pwc))


UPDATES: tuple[Update, ...] = (
    in_place,
    behind_the_version_counter,
    load_state_dict,
    assigned_state_dict,
    to_and_back,
    optimizer_step,
    new_parameter,
)


def assert_follows(layer: SPConv2d, x: torch.Tensor, update: Update, call: Callable[..., torch.Tensor]) -> None:
    """``call``, which runs ``layer`` in eval mode, sees what ``update`` does to the weights."""
    reference = copy.deepcopy(layer)
    reference.backend = "reference"
    layer.eval()
    with torch.inference_mode():
        before = call(x)
        torch.testing.assert_close(before, reference(x))
    update(layer)
    reference.load_state_dict(layer.state_dict())
    with torch.inference_mode():
        after = call(x)
        torch.testing.assert_close(after, reference(x))
    assert not torch.allclose(before, after)
