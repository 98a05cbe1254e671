"""The gate before the point-wise convolutions, and before the group-wise one where that is cheaper.

GAP and convolution are both linear, so of the point-wise convolutions the gate needs no map: with P output pixels and z
their input,

    S3 - S1 = (sum_pixels GWC(x3) + Wp sum_pixels z3 - W1 sum_pixels z1) / P

Nor does it need GWC(x3), for

    sum_pixels GWC(x3) = sum_taps Wg[tap] window[tap],    window[tap] = sum of x3 over the pixels that the tap reads

and at stride 1 a window is the whole map but for some rows and columns at its border.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import Geometry
from .native_convolution import is_matrix_product


def gate_difference(gwc: Tensor, z: Tensor, weight_pwc: Tensor, weight_redundant: Tensor) -> Tensor:
    """S3 - S1 without biases, [N, M, 1, 1], once GWC(x3) is there.

    Args:
        gwc: GWC(x3), [N, M, H, W], float32 or float64.
        z: input of the point-wise convolutions, [N, L, H, W], of the same dtype.
        weight_pwc, weight_redundant: [M, alpha L, 1, 1], [M, L - alpha L, 1, 1].
    """
    return _difference(pixel_sums(gwc), pixel_sums(z), weight_pwc, weight_redundant, gwc)


def gate_difference_of_windows(
    x: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, weight_redundant: Tensor, geometry: Geometry
) -> Tensor:
    """S3 - S1 without biases, [N, M, 1, 1], from x and weights alone; where :func:`sums_windows`.

    Args:
        x: [N, L, H, W], float32 or float64.
        weight_gwc: [M, alpha L / G, k, k].
        weight_pwc, weight_redundant: [M, alpha L, 1, 1], [M, L - alpha L, 1, 1].
    """
    batch, outputs, groups = x.shape[0], weight_gwc.shape[0], geometry.groups
    pixels_of = x.permute(0, 2, 3, 1)  # [N, H, W, L]
    rows = pixels_of.sum(2).double()
    representative = slice(weight_pwc.shape[1])
    windows = _windows(pixels_of[..., representative], rows[..., representative], geometry)
    windows = windows.view(batch, geometry.taps, groups, -1).permute(2, 0, 1, 3).reshape(groups, batch, -1)
    weights = weight_gwc.permute(0, 2, 3, 1).double().reshape(groups, outputs // groups, -1)
    gwc = torch.bmm(windows, weights.transpose(1, 2)).transpose(0, 1).reshape(batch, outputs)
    return _difference(gwc, rows.sum(1), weight_pwc, weight_redundant, x)


def sums_windows(x: Tensor, geometry: Geometry) -> bool:
    """Whether the sums over the windows of all taps take less time than a sum over GWC(x3): in a batch they do."""
    reach = (d * (k - 1) // 2 for d, k in zip(geometry.dilation, geometry.kernel_size, strict=True))
    fits = all(r < size for r, size in zip(reach, x.shape[2:], strict=True))
    return x.shape[0] > 1 and geometry.stride == (1, 1) and geometry.is_centred and fits


def _windows(x: Tensor, rows: Tensor, geometry: Geometry) -> Tensor:
    """The sum over what each tap reads: x [N, H, W, C] and its sums over W, [N, H, C] -> [N, k, k, C], in float64."""
    columns = [rows - x[:, :, cut].sum(2) if cut else rows for cut in _unread(geometry, axis=1)]
    by_column = torch.stack(columns, 2)  # [N, H, k, C]
    total = by_column.sum(1)
    return torch.stack([total - by_column[:, cut].sum(1) if cut else total for cut in _unread(geometry, axis=0)], 1)


def _unread(geometry: Geometry, axis: int) -> list[slice | None]:
    """Per tap, in order, the rows or columns at the border that it does not read; None where it reads all."""
    middle = geometry.kernel_size[axis] // 2
    offsets = [geometry.dilation[axis] * (tap - middle) for tap in range(geometry.kernel_size[axis])]
    return [slice(offset) if offset > 0 else slice(offset, None) if offset else None for offset in offsets]


def _difference(gwc: Tensor, z: Tensor, weight_pwc: Tensor, weight_redundant: Tensor, like: Tensor) -> Tensor:
    """S3 - S1 in the dtype of ``like``, [N, ., H, W], from sums over pixels: [N, M] of GWC(x3) and [N, L] of z."""
    pointwise = torch.cat((weight_pwc, -weight_redundant), 1).double().flatten(1)
    difference = torch.addmm(gwc, z, pointwise.T) / (like.shape[2] * like.shape[3])
    return difference[:, :, None, None].to(like.dtype)


def exponent_of_infinities(
    gwc: Tensor, z: Tensor, weight_pwc: Tensor, weight_redundant: Tensor, branch_bias: Tensor | None
) -> Tensor:
    """As :func:`gate_difference`, biases included, with each mean by itself: for means that may be infinite."""
    z3, z1 = pixel_sums(z).split((weight_pwc.shape[1], weight_redundant.shape[1]), 1)
    pixels = gwc.shape[2] * gwc.shape[3]
    s3 = torch.addmm(pixel_sums(gwc), z3, weight_pwc.double().flatten(1).T) / pixels
    s1 = torch.mm(z1, weight_redundant.double().flatten(1).T) / pixels
    if branch_bias is not None:
        s3 += branch_bias[0]
        s1 += branch_bias[1]
    return exponent(s3, s1)[:, :, None, None].to(gwc.dtype)


def exponent(s3: Tensor, s1: Tensor) -> Tensor:
    """S3 - S1, but NaN where softmax([S3, S1]) is: where the larger of the two is infinite."""
    largest = torch.maximum(s3, s1)
    return (s3 - largest).sub_(s1 - largest)


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
