"""The gate's exponent and the sums that it comes from."""

from __future__ import annotations

import torch
from torch import Tensor

COPIED = 1 << 19
"""Elements that are copied at a time."""


def exponent(s3: Tensor, s1: Tensor) -> Tensor:
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


def gate_dtype(x: Tensor) -> torch.dtype:
    """The dtype of means and gates of a map: float32 or better."""
    return torch.promote_types(x.dtype, torch.float32)


def bias_difference(branch_bias: Tensor, dtype: torch.dtype) -> Tensor:
    """b3 - b1, [M, 1, 1], subtracted in ``dtype``."""
    shift3, shift1 = branch_bias.to(dtype).unbind()
    return (shift3 - shift1)[:, None, None]
