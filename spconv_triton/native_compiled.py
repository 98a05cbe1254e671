"""The layer as ATen operations for Inductor, on a CPU.

Inductor fuses all that is done element by element, the sums and the gate among it, so nothing is written in place here.
What it calls are oneDNN's convolutions, which copy a slice of channels each: so x3 and x1 are copied before, once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .dispatch import is_exporting
from .geometry import Geometry
from .native import Epilogue


def compose(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    geometry: Geometry,
    after: Epilogue | None = None,
) -> Tensor:
    """As :func:`spconv_triton.native.compose`, which it is on other devices and in a model to be exported."""
    if weight_redundant is None or not x.is_cpu or is_exporting():
        return native.compose(x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias, geometry, after)
    sizes = weight_pwc.shape[1], weight_redundant.shape[1]
    x3, x1 = (part.contiguous(memory_format=torch.channels_last) for part in x.split(sizes, 1))
    return native.compose_parts(x3, x1, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias, geometry, after)
