"""The gate from statistics of x alone: GAP and convolution are both linear, so neither U3 nor U1 is needed.

    S1[n,m] = sum_c W1[m,c] mean(x1[n,c])
    S3[n,m] = sum_c Wp[m,c] mean(x3[n,c]) + sum_{c,r,s} Wg[m,c,r,s] win[n,c,r,s] / P

win[n,c,r,s] is the sum of x3[n,c] over the pixels that tap (r,s) reads. At stride 1 and half-window padding that is the
whole map but for a few border rows and columns,

    win = total - (rows that tap r misses) - (columns that tap s misses) + (pixels that both miss)

so one read of x and its border give every win.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .geometry import Geometry


def gate_difference(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    geometry: Geometry,
) -> Tensor:
    """S3 - S1 without biases, [N, M, 1, 1], for stride 1 and half-window padding (``geometry.is_centred``).

    Args:
        x: [N, L, H, W], float32 or float64.
        weight_gwc: [M, alpha L / G, k, k].
        weight_pwc: [M, alpha L, 1, 1].
        weight_redundant: [M, L - alpha L, 1, 1].
    """
    representative, groups = weight_pwc.shape[1], geometry.groups
    batch, outputs = x.shape[0], weight_gwc.shape[0]
    sums = row_sums(x)
    windows = window_sums(x[:, :representative], sums[:, :representative], geometry)
    windows = windows.view(batch, groups, -1).transpose(0, 1)
    grouped = torch.bmm(windows, weight_gwc.double().reshape(groups, outputs // groups, -1).transpose(1, 2))
    difference = grouped.transpose(0, 1).reshape(batch, outputs)
    pointwise = torch.cat((weight_pwc, -weight_redundant), 1).double().flatten(1)
    difference = torch.addmm(difference, sums.sum(2), pointwise.T) / (x.shape[2] * x.shape[3])
    return difference[:, :, None, None].to(x.dtype)


def row_sums(x: Tensor) -> Tensor:
    """Sums over the columns of [N, C, H, W]: [N, C, H] in float64.

    Where x has a mean, S3 and S1 are large and their difference is not; from here on float64 costs next to nothing.
    """
    return x.permute(0, 2, 3, 1).sum(2).double().transpose(1, 2)  # so reduced, channels_last is read in order


def window_sums(x3: Tensor, sums: Tensor, geometry: Geometry) -> Tensor:
    """win, [N, C, k k], in float64; ``x3`` [N, C, H, W] and its :func:`row_sums`, ``sums``."""
    row_lines, row_signs = _missed(x3.shape[2], geometry.kernel_size[0], geometry.dilation[0])
    column_lines, column_signs = _missed(x3.shape[3], geometry.kernel_size[1], geometry.dilation[1])
    columns = _take(x3, 3, column_lines).double()  # [N, C, H, missed columns]
    # Line 0 of either axis stands for all lines, the others for one missed line each.
    sums = torch.cat((sums[..., None], columns), 3)
    sums = torch.cat((sums.sum(2, keepdim=True), _take(sums, 2, row_lines)), 2)
    return sums.flatten(2) @ torch.kron(sums.new_tensor(row_signs), sums.new_tensor(column_signs))


def _take(x: Tensor, axis: int, lines: tuple[int, ...]) -> Tensor:
    """The given lines of an axis of [N, C, H, W]; of every 3 x 3 window the first and the last, which are a view."""
    if lines == (0, x.shape[axis] - 1) and lines[1] > 0:
        return x[:, :, :: lines[1]] if axis == 2 else x[:, :, :, :: lines[1]]
    return x.index_select(axis, torch.tensor(lines, device=x.device, dtype=torch.long))


@functools.lru_cache(maxsize=256)
def _missed(size: int, taps: int, dilation: int) -> tuple[tuple[int, ...], list[list[float]]]:
    """The lines of an axis that some tap misses, and [1 + lines, taps]: 1, then -1 where the tap misses the line."""
    offsets = [dilation * (tap - taps // 2) for tap in range(taps)]
    missed = [{line for line in range(size) if not 0 <= line - offset < size} for offset in offsets]
    lines = tuple(sorted(set[int]().union(*missed)))
    return lines, [[1.0] * taps, *([-1.0 if line in misses else 0.0 for misses in missed] for line in lines)]
