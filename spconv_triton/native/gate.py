"""d = S3 - S1, the gate's argument, and the sums that it comes from: over the branches, or before there are any.

GAP and convolution are both linear, so of the point-wise convolutions the gate needs no map: with P output pixels and z
their input,

    S3 - S1 = (sum_pixels GWC(x3) + Wp sum_pixels z3 - W1 sum_pixels z1) / P

Nor does it need GWC(x3), only sums of x3 over what each tap reads; but those took longer than a sum over GWC(x3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import Geometry
from .products import is_matrix_product

COPIED = 1 << 19
"""Elements that are copied at a time."""


def gate_argument(s3: Tensor, s1: Tensor) -> Tensor:
    """S3 - S1, but NaN where softmax([S3, S1]) is: where the larger of the two is infinite."""
    return torch.sub(s3, s1).add_(torch.maximum(s3, s1), alpha=0)  # 0 times infinity is NaN


def sums_of_maps(x: Tensor) -> Tensor:
    """Sums over the pixels of [N, C, H, W]: [N, C, 1, 1], in float32 or better."""
    if x.dtype in (torch.float32, torch.float64):
        return x.sum((2, 3), keepdim=True)
    # ATen sums a copy in float32: one that stays in the cache.
    samples = max(1, COPIED // max(1, x.shape[1] * x.shape[2] * x.shape[3]))
    parts = [part.sum((2, 3), keepdim=True, dtype=torch.float32) for part in x.split(samples)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def means_of_maps(x: Tensor) -> Tensor:
    """Means over the pixels, likewise."""
    return sums_of_maps(x).div_(x.shape[2] * x.shape[3])


def bias_difference(branch_bias: Tensor, dtype: torch.dtype) -> Tensor:
    """b3 - b1, [M, 1, 1], subtracted in ``dtype``."""
    shift3, shift1 = branch_bias.to(dtype).unbind()
    return (shift3 - shift1)[:, None, None]


def gate_comes_first(x: Tensor, geometry: Geometry) -> bool:
    """Whether weights of every sample, scaled by its gate, are a smaller thing than one more map."""
    height, width = geometry.output_size(x.shape[2], x.shape[3])
    return height * width > x.shape[1] and is_matrix_product(x, x.shape[1] ** 2)


def difference_of_means(gwc: Tensor, z: Tensor, weight_pwc: Tensor, weight_redundant: Tensor) -> Tensor:
    """S3 - S1 without biases, [N, M, 1, 1].

    Where x has a mean, S3 and S1 are large and their difference is not. ATen adds pixels in a tree, which leaves one
    rounding, and float64 (of bfloat16 maps float32) takes it from there.

    Args:
        gwc: GWC(x3), [N, M, H, W].
        z: input of the point-wise convolutions, [N, L, H, W], of the same dtype.
        weight_pwc, weight_redundant: [M, alpha L, 1, 1], [M, L - alpha L, 1, 1].
    """
    batch, outputs, height, width = gwc.shape
    dtype = torch.float32 if gwc.dtype == torch.bfloat16 else torch.float64
    weights = torch.cat((weight_pwc, -weight_redundant), 1).flatten(1).to(dtype)
    of_gwc, of_z = (sums_of_maps(maps).flatten(1).to(dtype) for maps in (gwc, z))
    sums = torch.addmm(of_gwc, of_z, weights.t())
    return sums.div_(height * width).to(torch.promote_types(gwc.dtype, torch.float32)).view(batch, outputs, 1, 1)
