"""The gate once the group-wise convolution is there, before any point-wise one.

GAP and convolution are both linear, so of the point-wise convolutions the gate needs no map: with P output pixels and z
their input,

    S3 - S1 = (sum_pixels GWC(x3) + Wp sum_pixels z3 - W1 sum_pixels z1) / P
"""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import Geometry
from .native_convolution import is_matrix_product


def gate_difference(gwc: Tensor, z: Tensor, weight_pwc: Tensor, weight_redundant: Tensor) -> Tensor:
    """S3 - S1 without biases, [N, M, 1, 1].

    Args:
        gwc: GWC(x3), [N, M, H, W], float32 or float64.
        z: input of the point-wise convolutions, [N, L, H, W], of the same dtype.
        weight_pwc, weight_redundant: [M, alpha L, 1, 1], [M, L - alpha L, 1, 1].
    """
    pointwise = torch.cat((weight_pwc, -weight_redundant), 1).double().flatten(1)
    difference = torch.addmm(pixel_sums(gwc), pixel_sums(z), pointwise.T) / (gwc.shape[2] * gwc.shape[3])
    return difference[:, :, None, None].to(gwc.dtype)


def pixel_sums(x: Tensor) -> Tensor:
    """Sums over the pixels of [N, C, H, W]: [N, C] in float64.

    Where x has a mean, S3 and S1 are large and their difference is not; from rows on float64 costs next to nothing.
    """
    return x.permute(0, 2, 3, 1).sum(2).sum(1, dtype=torch.float64)  # so reduced, channels_last is read in order


def bias_difference(branch_bias: Tensor, dtype: torch.dtype) -> Tensor:
    """b3 - b1, [M, 1, 1], subtracted in ``dtype``."""
    shift3, shift1 = branch_bias.to(dtype).unbind()
    return (shift3 - shift1)[:, None, None]


def gate_comes_first(x: Tensor, geometry: Geometry) -> bool:
    """Whether the weights of every sample, scaled by its gate, are a smaller thing than one more map."""
    height, width = geometry.output_size(x.shape[2], x.shape[3])
    return height * width > x.shape[1] and is_matrix_product(x)
