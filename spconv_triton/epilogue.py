"""What follows a layer in inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "none": lambda y, _: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
}
"""By name; called with a map, and whether the result may be written over it. :mod:`.kernels.epilogue` has the same."""


class Epilogue(NamedTuple):
    """What follows the layer in inference: Y = activation(norm_scale (beta U3 + gamma U1) + bias + residual).

    Attributes:
        norm_scale: [M] or None, dtype of x or float32.
        residual: [N, M, H_out, W_out] or None, dtype of x.
        activation: a name in :data:`ACTIVATIONS`.
    """

    norm_scale: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "none"

    def __call__(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """The epilogue part by part, on beta U3 + gamma U1; computed in float32 or better, rounded once."""
        dtype = y.dtype
        y = y.to(torch.promote_types(dtype, torch.float32))
        if self.norm_scale is not None:
            y = y * self.norm_scale.to(y.dtype)[:, None, None]
        if bias is not None:
            y = y + bias.to(y.dtype)[:, None, None]
        if self.residual is not None:
            y = y + self.residual
        return activate(y, self.activation).to(dtype)


NOTHING = Epilogue()


def activate(y: Tensor, activation: str, *, inplace: bool = False) -> Tensor:
    """One of :data:`ACTIVATIONS` of ``y``."""
    return ACTIVATIONS[activation](y, inplace)
