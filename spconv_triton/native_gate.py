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
    total = x.sum((2, 3))  # [N, L]
    windows = window_sums(x[:, :representative], total[:, :representative], geometry)  # [N, alpha L, k k]
    windows = windows.view(batch, groups, -1).transpose(0, 1)
    grouped = torch.bmm(windows, weight_gwc.reshape(groups, outputs // groups, -1).transpose(1, 2))
    difference = grouped.transpose(0, 1).reshape(batch, outputs)
    difference = torch.addmm(difference, total[:, :representative], weight_pwc.flatten(1).T)
    difference = torch.addmm(difference, total[:, representative:], weight_redundant.flatten(1).T, alpha=-1)
    return (difference / (x.shape[2] * x.shape[3]))[:, :, None, None]


def window_sums(x3: Tensor, total: Tensor, geometry: Geometry) -> Tensor:
    """win, [N, C, k k]; ``x3`` [N, C, H, W] and its sum over the pixels, ``total`` [N, C]."""
    row_lines, row_signs = _missed(x3.shape[2], geometry.kernel_size[0], geometry.dilation[0])
    column_lines, column_signs = _missed(x3.shape[3], geometry.kernel_size[1], geometry.dilation[1])
    rows, columns = _take(x3, 2, row_lines), _take(x3, 3, column_lines)
    first = torch.cat((total[:, :, None], columns.sum(2)), 2)[:, :, None]  # [N, C, 1, 1 + columns]
    others = torch.cat((rows.sum(3, keepdim=True), _take(rows, 3, column_lines)), 3)  # [N, C, rows, 1 + columns]
    signs = torch.kron(x3.new_tensor(row_signs), x3.new_tensor(column_signs))
    return torch.cat((first, others), 2).flatten(2) @ signs


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
