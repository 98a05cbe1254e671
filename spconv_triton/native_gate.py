"""The gate once the group-wise convolution is there, before any point-wise one.

GAP and convolution are both linear, so of the point-wise convolutions the gate needs no map: with P output pixels and z
their input,

    S3 - S1 = (sum_pixels GWC(x3) + Wp sum_pixels z3 - W1 sum_pixels z1) / P

Nor does it need GWC(x3), only sums of x3 over what each tap reads; but those took longer than a sum over GWC(x3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import Geometry
from .native_convolution import is_matrix_product

COPIED = 1 << 19
"""Elements that are copied at a time."""

GATE_FIRST = 1
"""Output pixels per input channel above which the gate comes first."""


def gate_difference(gwc: Tensor, z: Tensor, weight_pwc: Tensor, weight_redundant: Tensor) -> Tensor:
    """S3 - S1 without biases, [N, M, 1, 1].

    Args:
        gwc: GWC(x3), [N, M, H, W], float32 or float64.
        z: input of the point-wise convolutions, [N, L, H, W], of the same dtype.
        weight_pwc, weight_redundant: [M, alpha L, 1, 1], [M, L - alpha L, 1, 1].
    """
    return difference_of_means(gwc, z, gate_weights(weight_pwc, weight_redundant))


def gate_weights(weight_pwc: Tensor, weight_redundant: Tensor) -> Tensor:
    """[Wp, -W1] transposed, [L, M], in the dtype of sums."""
    weights = torch.cat((weight_pwc, -weight_redundant), 1).flatten(1).t()
    return weights.to(sum_dtype(weights))


def difference_of_means(gwc: Tensor, z: Tensor, weights: Tensor) -> Tensor:
    """:func:`gate_difference` with the weights of :func:`gate_weights`."""
    batch, outputs, height, width = gwc.shape
    sums = torch.addmm(pixel_sums(gwc), pixel_sums(z), weights)
    return sums.div_(height * width).to(gate_dtype(gwc)).view(batch, outputs, 1, 1)


def exponent_of_infinities(
    gwc: Tensor, z: Tensor, weight_pwc: Tensor, weight_redundant: Tensor, branch_bias: Tensor | None
) -> Tensor:
    """As :func:`gate_difference`, biases included, with each mean by itself: for means that may be infinite."""
    z3, z1 = pixel_sums(z).split((weight_pwc.shape[1], weight_redundant.shape[1]), 1)
    pixels = gwc.shape[2] * gwc.shape[3]
    s3 = torch.addmm(pixel_sums(gwc), z3, weight_pwc.to(z3.dtype).flatten(1).T) / pixels
    s1 = torch.mm(z1, weight_redundant.to(z1.dtype).flatten(1).T) / pixels
    if branch_bias is not None:
        s3 += branch_bias[0]
        s1 += branch_bias[1]
    return exponent(s3, s1)[:, :, None, None].to(gate_dtype(gwc))


def exponent(s3: Tensor, s1: Tensor) -> Tensor:
    """S3 - S1, but NaN where softmax([S3, S1]) is: where the larger of the two is infinite."""
    return torch.sub(s3, s1).add_(torch.maximum(s3, s1), alpha=0)  # 0 times infinity is NaN


def pixel_sums(x: Tensor) -> Tensor:
    """Sums over the pixels of [N, C, H, W]: [N, C] in :func:`sum_dtype`.

    Where x has a mean, S3 and S1 are large and their difference is not. ATen adds in a tree, so what is left is one
    rounding. Inductor adds one term after the other, so there float64 begins with the rows.
    """
    if torch.compiler.is_compiling():
        return x.sum(3).sum(2, dtype=torch.float64)
    return sums_of_maps(x).flatten(1).to(sum_dtype(x))


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over pixels are added up: one in which their roundings are below those of ``x``."""
    if torch.compiler.is_compiling() or x.dtype in (torch.float32, torch.float64):
        return torch.float64
    return torch.float32


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


def gate_dtype(x: Tensor) -> torch.dtype:
    """The dtype of means and gates of a map: float32 or better."""
    return torch.promote_types(x.dtype, torch.float32)


def bias_difference(branch_bias: Tensor, dtype: torch.dtype) -> Tensor:
    """b3 - b1, [M, 1, 1], subtracted in ``dtype``."""
    shift3, shift1 = branch_bias.to(dtype).unbind()
    return (shift3 - shift1)[:, None, None]


def gate_comes_first(x: Tensor, geometry: Geometry, pixels_per_channel: int = GATE_FIRST) -> bool:
    """Whether the weights of every sample, scaled by its gate, are a smaller thing than one more map."""
    height, width = geometry.output_size(x.shape[2], x.shape[3])
    return height * width > pixels_per_channel * x.shape[1] and is_matrix_product(x)
