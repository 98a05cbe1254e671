"""What every way through the backward (:mod:`spconv_triton.native.backward`) starts from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import Geometry
from . import branches
from .convolution import channels_last, map_dtype


class Operands(NamedTuple):
    """Maps in channels_last on a CPU; L = alpha L + (L - alpha L) channels in, M out.

    Attributes:
        x: [N, L, H, W].
        x3: its first alpha L channels, contiguous.
        z: what the point-wise convolutions read, [N, L, H_out, W_out]; ``x`` itself at stride 1
            with padding of half the window.
        g: dL/dY, [N, M, H_out, W_out], in the dtype of maps.
        beta, gamma: the gate, [N, M, 1, 1], float32 or better.
        weight_gwc, weight_pwc, weight_redundant: of the layer.
        geometry: of the layer.
    """

    x: Tensor
    x3: Tensor
    z: Tensor
    g: Tensor
    beta: Tensor
    gamma: Tensor
    weight_gwc: Tensor
    weight_pwc: Tensor
    weight_redundant: Tensor
    geometry: Geometry


def operands(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    geometry: Geometry,
    d: Tensor,
    grad: Tensor,
) -> Operands:
    """Of a layer's inputs, its gate's argument d = S3 - S1 [N, M, 1, 1], and dL/dY."""
    x = channels_last(x)
    return Operands(
        x=x,
        x3=channels_last(x.narrow(1, 0, weight_pwc.shape[1])),  # else each of the convolutions copies it
        z=channels_last(branches.pointwise_input(x, geometry)),  # one padded pixel of x comes out in NCHW
        g=channels_last(grad).to(map_dtype(x)),
        beta=torch.sigmoid(d),
        gamma=torch.sigmoid(-d),
        weight_gwc=weight_gwc,
        weight_pwc=weight_pwc,
        weight_redundant=weight_redundant,
        geometry=geometry,
    )
