"""What both ways through the backward (:mod:`spconv_triton.native_backward`) start from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .geometry import Geometry
from .native_convolution import channels_last, is_matrix_product, map_dtype
from .native_folding import Block, can_fold, fold, other_blocks, whole

FOLDED_CHANNELS = 32
"""Of a group, from which half of a point-wise product takes half of its time."""

FOLDED_PIXELS = 128
"""Of all samples, from which folding takes less time than it saves."""


class Operands(NamedTuple):
    """Maps in channels_last on a CPU; L = alpha L + (L - alpha L) channels in, M out.

    Attributes:
        x: [N, L, H, W].
        x3: its first alpha L channels, contiguous.
        z: what the point-wise convolutions read, [N, L, H_out, W_out]; ``x`` itself at stride 1.
        g: dL/dY, [N, M, H_out, W_out], in the dtype of maps.
        beta, gamma: the gate, [N, M, 1, 1], float32 or better.
        convolved: the weight of the group-wise convolution: the layer's, or with blocks of ``weight_pwc`` folded into
            it (:mod:`spconv_triton.native_folding`).
        blocks: those of ``weight_pwc`` that are not in ``convolved``.
        weight_pwc, weight_redundant: of the layer.
        geometry: of the layer.
    """

    x: Tensor
    x3: Tensor
    z: Tensor
    g: Tensor
    beta: Tensor
    gamma: Tensor
    convolved: Tensor
    blocks: tuple[Block, ...]
    weight_pwc: Tensor
    weight_redundant: Tensor
    geometry: Geometry

    @property
    def is_folded(self) -> bool:
        return self.blocks != whole(self.weight_pwc)


def operands(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    geometry: Geometry,
    d: Tensor,
    grad: Tensor,
) -> Operands:
    """Of a layer's inputs, its gate's exponent d = S3 - S1 [N, M, 1, 1], and dL/dY."""
    x = channels_last(x)
    if _folding_pays(x, weight_gwc, geometry):
        convolved, blocks = fold(weight_gwc, weight_pwc, geometry), other_blocks(weight_gwc, geometry.groups)
    else:
        convolved, blocks = weight_gwc, whole(weight_pwc)
    return Operands(
        x=x,
        x3=channels_last(x.narrow(1, 0, weight_pwc.shape[1])),  # else each of the convolutions copies it
        z=channels_last(native.pointwise_input(x, geometry)),  # one padded pixel of x comes out in NCHW
        g=channels_last(grad).to(map_dtype(x)),
        beta=torch.sigmoid(d),
        gamma=torch.sigmoid(-d),
        convolved=convolved,
        blocks=blocks,
        weight_pwc=weight_pwc,
        weight_redundant=weight_redundant,
        geometry=geometry,
    )


def _folding_pays(x: Tensor, weight_gwc: Tensor, geometry: Geometry) -> bool:
    """Not in bfloat16, where the folded weight would be a rounding off."""
    batch, _, height, width = x.shape
    pixels = batch * height * width / (geometry.stride[0] * geometry.stride[1])
    return (
        weight_gwc.shape[1] >= FOLDED_CHANNELS
        and pixels >= FOLDED_PIXELS
        and x.dtype in (torch.float32, torch.float64)
        and can_fold(geometry, height, width)
        and is_matrix_product(x)
    )
