"""How many bytes each kernel loads and stores, and what it multiplies: a formula a kernel, and no estimate among them.

A byte is counted where an unmasked lane or the inside of a box names it, as the kernel's loops come to it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from triton import cdiv

from benchmarks.tally import Tally, tensor_of
from spconv_triton.kernels import packing


class Reach(NamedTuple):
    """What windows reach along one axis of an image: how often they read inside it, and where."""

    reads: int
    touched: np.ndarray


class Area(NamedTuple):
    """The same of an image: reads, and the pixels that are read."""

    reads: int
    rows: np.ndarray
    columns: np.ndarray

    @property
    def touched(self) -> int:
        return int(self.rows.sum() * self.columns.sum())

    def united(self, other: Area) -> int:
        """Pixels that either reads."""
        both = (self.rows & other.rows).sum() * (self.columns & other.columns).sum()
        return self.touched + other.touched - int(both)


def _reach(positions: np.ndarray, size: int) -> Reach:
    inside = positions[(positions >= 0) & (positions < size)]
    touched = np.zeros(size, dtype=bool)
    touched[inside] = True
    return Reach(inside.size, touched)


def _area(rows: Reach, columns: Reach) -> Area:
    return Area(rows.reads * columns.reads, rows.touched, columns.touched)


def _window(a: SimpleNamespace, axis: str) -> tuple[int, int, int, int, int]:
    """Kernel size, stride, padding, dilation and centre along ``"H"`` or ``"W"``."""
    size, stride, padding, dilation = (getattr(a, f"{name}{axis}") for name in ("K", "STRIDE_", "PAD_", "DILATION_"))
    return size, stride, padding, dilation, dilation * (size - 1) // 2 - padding


def tap_area(a: SimpleNamespace) -> Area:
    """What the taps of all output pixels read of one sample."""

    def along(axis: str, size: int, outputs: int) -> Reach:
        kernel, stride, padding, dilation, _ = _window(a, axis)
        return _reach(np.add.outer(np.arange(outputs) * stride - padding, np.arange(kernel) * dilation), size)

    return _area(along("H", a.H, a.HO), along("W", a.W, a.WO))


def _pool(a: SimpleNamespace) -> Area:
    """What the point-wise convolutions read: the centre tap, and at a stride the window that begins there."""

    def along(axis: str, size: int, outputs: int) -> Reach:
        _, stride, _, _, centre = _window(a, axis)
        return _reach(np.add.outer(np.arange(outputs) * stride + centre, np.arange(stride)), size)

    return _area(along("H", a.H, a.HO), along("W", a.W, a.WO))


def _boxes(starts: np.ndarray, length: int, size: int) -> int:
    """How many positions of boxes lie inside an axis."""
    return int(np.clip(np.minimum(starts + length, size) - np.maximum(starts, 0), 0, None).sum())


def _starts(size: int, block: int) -> np.ndarray:
    return np.arange(0, size, block)


def _precision(tensor: Any, precision: str = "ieee") -> str:
    """Of products of ``tensor``; float32 as a kernel's PRECISION says."""
    return precision if tensor_of(tensor).element_size() == 4 else "half"


def _flat_forward(a: SimpleNamespace, t: Tally, redundant: int) -> int:
    """The sums of :mod:`kernels.accumulate`, of ``redundant`` channels too."""
    group = a.CR // a.G
    co_blocks = cdiv(a.CO // a.G, a.BLOCK_CO)
    blocks = cdiv(a.pixels, a.BLOCK_PIX)
    batch = a.pixels // (a.HO * a.WO)
    taps, pool = tap_area(a), _pool(a)
    channels = a.CR + redundant
    t.load(
        "x_ptr",
        batch * co_blocks * (channels * a.G * pool.reads + a.CR * taps.reads),
        batch * (a.CR * pool.united(taps) + redundant * pool.touched),
    )
    t.load("gwc_ptr", blocks * a.CO * a.KH * a.KW * group)
    t.load("pwc_ptr", blocks * a.CO * a.CR)
    steps = cdiv(a.CR, a.BLOCK_C) + cdiv(redundant, a.BLOCK_C) + a.KH * a.KW * cdiv(group, a.BLOCK_C)
    programs = blocks * a.G * co_blocks
    t.multiply(_precision(a.x_ptr, a.PRECISION), programs * steps, a.BLOCK_PIX, a.BLOCK_CO, a.BLOCK_C)
    return programs


def _branch_forward(a: SimpleNamespace, t: Tally) -> int:
    t.store("u3_ptr")
    return _flat_forward(a, t, 0)


def _parts(a: SimpleNamespace) -> int:
    """Parts of samples that the blocks of pixels hold."""
    first = _starts(a.pixels, a.BLOCK_PIX)
    last = np.minimum(first + a.BLOCK_PIX, a.pixels) - 1
    return int((last // (a.HO * a.WO) - first // (a.HO * a.WO) + 1).sum())


def _onepass_forward(a: SimpleNamespace, t: Tally) -> int:
    for plane in ("ratio_ptr", "scale_ptr", "offset_ptr"):
        t.load(plane, _parts(a) * a.CO)
    t.load("redundant_ptr", cdiv(a.pixels, a.BLOCK_PIX) * a.CO * (a.C - a.CR))
    t.load("residual_ptr", a.pixels * a.CO if a.RESIDUAL else 0)
    t.store("y_ptr")
    return _flat_forward(a, t, a.C - a.CR)


def _branches_forward(a: SimpleNamespace, t: Tally) -> int:
    t.load("redundant_ptr", cdiv(a.pixels, a.BLOCK_PIX) * a.CO * (a.C - a.CR))
    t.store("u_ptr")
    t.store("mean_ptr", _parts(a) * 2 * a.CO)
    t.store("square_ptr", _parts(a) * 2 * a.CO)
    return 2 * _flat_forward(a, t, a.C - a.CR)


def _sample_moments(a: SimpleNamespace, t: Tally) -> int:
    batch = a.sample_mean_ptr.shape[0]
    starts = np.arange(batch) * a.P
    slots = int(((starts + a.P - 1) // a.BLOCK_PIX - starts // a.BLOCK_PIX + 1).sum())
    t.load("mean_ptr", a.C * (batch + 2 * slots), a.C * slots)
    t.load("square_ptr", a.C * slots, a.C * slots)
    t.store("sample_mean_ptr")
    t.store("sample_square_ptr")
    return batch * cdiv(a.C, a.BLOCK_C)


def _norm_gate(a: SimpleNamespace, t: Tally) -> int:
    t.load("sample_mean_ptr", 2 * a.C * (1 + 3 * a.N))
    t.load("sample_square_ptr", 2 * a.C * a.N)
    for name in ("weight3_ptr", "bias3_ptr", "weight1_ptr", "bias1_ptr"):
        t.load(name, a.C)
    t.load("bias_ptr", a.C if a.BIAS else 0)
    for name in ("batch_ptr", "gate_ptr", "planes_ptr"):
        t.store(name)
    return cdiv(a.C, a.BLOCK_C)


def _norm_blend(a: SimpleNamespace, t: Tally) -> int:
    blocks = cdiv(a.P, a.BLOCK_PIX)
    t.load("u_ptr", 2 * a.N * a.P * a.C)
    t.load("batch_ptr", 2 * a.N * blocks * a.C, 2 * a.C)
    t.load("planes_ptr", 3 * a.N * blocks * a.C)
    t.store("y_ptr")
    return a.N * blocks * cdiv(a.C, a.BLOCK_C)


def _window_statistics(a: SimpleNamespace, t: Tally) -> int:
    splits = a.partial_ptr.shape[0]
    row_blocks = cdiv(a.ROWS, a.BLOCK_ROWS)
    columns = a.N * cdiv(a.C, a.BLOCK_C) * row_blocks
    t.load("x_ptr", row_blocks * a.N * a.C * a.H * a.W, a.N * a.C * a.H * a.W)
    t.store("partial_ptr")
    steps = columns * a.H * cdiv(a.W, a.BLOCK_W)
    t.multiply(_precision(a.x_ptr), steps, a.BLOCK_ROWS, a.BLOCK_C, a.BLOCK_W)
    group, redundant, packs = a.CR // a.G, a.C - a.CR, int(a.PACK)
    folded = (a.STRIDE_H**2 - 1) * a.MERGE * group  # into taps, after the first
    for name, weights in (("gwc_ptr", 9 * group), ("pwc_ptr", a.CR + folded), ("redundant_ptr", redundant)):
        t.load(name, packs * a.CO * weights)
    blocks = packs * cdiv(a.CO, packing.BLOCK_ROWS.value) * cdiv(a.packed_ptr.shape[-1], packing.BLOCK_COLUMNS.value)
    t.store("packed_ptr", None if a.PACK else 0)
    return (columns + cdiv(blocks, splits)) * splits


def _gate_planes(a: SimpleNamespace, t: Tally) -> int:
    group, redundant = a.CR // a.G, a.C - a.CR
    co_blocks, few = a.G * cdiv(a.CO // a.G, a.BLOCK_CO), a.N <= a.FEW
    sample_blocks = a.N * (a.BLOCK_CO // a.FEW_CO) if few else cdiv(a.N, a.BLOCK_N)
    reads = a.N if few else sample_blocks  # of the weights
    pooled = a.POOL_ROW == a.TAPS
    pool_rows = 2 if pooled else 1
    means = pool_rows * a.C + a.TAPS * group
    stored = a.N * a.SPLITS * (pool_rows * a.C + a.TAPS * a.CR)  # those of few samples are made again to be stored
    t.load(
        "partial_ptr",
        co_blocks * sample_blocks * a.SPLITS * means + stored if few else co_blocks * a.N * a.SPLITS * means,
        a.N * a.SPLITS * (pool_rows * a.C + (a.TAPS - (not pooled)) * a.CR),
    )
    weights = {"gwc_ptr": a.TAPS * group, "pwc_ptr": a.CR, "redundant_ptr": redundant}
    for name, columns in weights.items():
        t.load(name, a.CO * reads * columns)
    t.load("bias_ptr", reads * a.CO if a.BIAS else 0)
    t.load("branch_bias_ptr", 2 * reads * a.CO if a.BRANCH_BIAS else 0)
    t.load("norm_scale_ptr", reads * a.CO if a.NORM_SCALE else 0)
    for name in ("ratio_ptr", "scale_ptr", "offset_ptr", "tap_mean_ptr", "pool_mean_ptr"):
        t.store(name)
    if not few:
        steps = sum(cdiv(columns, a.BLOCK_C) for columns in weights.values())
        halves = tensor_of(a.pwc_ptr).element_size() < 4
        precision = "halfx2" if halves else a.PRECISION
        t.multiply(precision, co_blocks * sample_blocks * steps, a.BLOCK_N, a.BLOCK_CO, a.BLOCK_C)
    return co_blocks * sample_blocks


def _onepass_descriptor(a: SimpleNamespace, t: Tally) -> int:
    group = a.CR // a.G * a.MERGE
    pointwise = a.C - group
    window = (1,) if a.STRIDE == 1 else (1, 2)

    def along(size: int, block: int) -> tuple[int, int]:
        """Positions inside that the window reads, and that the taps read."""
        starts = _starts(size, block)
        inside = [_boxes(starts + (tap - 1 if a.STRIDE == 1 else -(tap == 0)), block, size) for tap in range(3)]
        return sum(inside[tap] for tap in window), sum(inside)

    rows, columns = along(a.HO, a.BLOCK_H), along(a.WO, a.BLOCK_W)
    window_reads, tap_reads = (row * column for row, column in zip(rows, columns, strict=True))
    places = cdiv(a.HO, a.BLOCK_H) * cdiv(a.WO, a.BLOCK_W)
    sample_blocks, co_blocks = cdiv(a.N, a.BLOCK_N), a.CO // a.BLOCK_CO
    t.load("x_desc", co_blocks * a.N * (pointwise * window_reads + group * tap_reads))
    depth = (pointwise * a.STRIDE**2 + 9 * group) * places
    t.load("packed_desc", sample_blocks * a.CO * depth, a.CO * (pointwise + 9 * group))
    for plane, reads in (("ratio_ptr", 2), ("scale_ptr", 1), ("offset_ptr", 1)):
        t.load(plane, reads * places * a.N * a.CO)
    outputs = a.N * a.HO * a.WO * a.CO
    t.load("residual_desc", outputs if a.RESIDUAL else 0)
    t.store("y_desc")
    pixels = a.BLOCK_N * a.BLOCK_H * a.BLOCK_W
    t.multiply(_precision(a.x_desc, a.PRECISION), sample_blocks * co_blocks * depth, a.BLOCK_CO, pixels)
    return sample_blocks * places * co_blocks


def _fusion_statistics(a: SimpleNamespace, t: Tally) -> int:
    pixels = a.N * a.P * a.C
    t.load("u3_ptr", pixels)
    t.load("u1_ptr", pixels)
    t.load("grad_ptr", pixels if a.WEIGHTED else 0)
    t.store("partial_ptr")
    return a.N * cdiv(a.C, a.BLOCK_C) * a.partial_ptr.shape[0]


def _fusion_blend(a: SimpleNamespace, t: Tally) -> int:
    blocks = cdiv(a.P, a.BLOCK_PIX)
    for name in ("u3_ptr", "u1_ptr"):
        t.load(name, a.N * a.P * a.C)
    t.load("partial_ptr", blocks * a.SPLITS * a.N * a.C)
    t.store("y_ptr")
    t.store("gate_ptr")
    return a.N * blocks * cdiv(a.C, a.BLOCK_C)


def _fusion_blend_grad(a: SimpleNamespace, t: Tally) -> int:
    blocks = cdiv(a.P, a.BLOCK_PIX)
    t.load("grad_ptr", a.N * a.P * a.C)
    t.load("partial_ptr", blocks * a.SPLITS * a.N * a.C)
    t.load("gate_ptr", blocks * a.N * a.C)
    t.store("du3_ptr")
    t.store("du1_ptr")
    return a.N * blocks * cdiv(a.C, a.BLOCK_C)


def _norm_sums(a: SimpleNamespace, t: Tally) -> int:
    splits = a.partial_ptr.shape[0]
    t.load("grad_ptr", a.N * a.P * a.C)
    t.load("u_ptr", 2 * a.N * a.P * a.C)
    t.load("batch_ptr", 2 * a.N * splits * a.C, 2 * a.C)
    t.store("partial_ptr")
    return a.N * cdiv(a.C, a.BLOCK_C) * splits


def _norm_coefficients(a: SimpleNamespace, t: Tally) -> int:
    t.load("partial_ptr", a.SPLITS * 8 * a.N * a.C)  # five sums for the totals, and three again for the planes
    t.load("batch_ptr", 2 * a.C, 2 * a.C)
    t.load("gate_ptr", 2 * a.N * a.C)
    for name in ("weight3_ptr", "bias3_ptr", "weight1_ptr", "bias1_ptr"):
        t.load(name, a.C)
    for name in ("planes_ptr", "slope_ptr", "d_norm_ptr"):
        t.store(name)
    return cdiv(a.C, a.BLOCK_C)


def _norm_blend_grad(a: SimpleNamespace, t: Tally) -> int:
    blocks = cdiv(a.P, a.BLOCK_PIX)
    t.load("grad_ptr", a.N * a.P * a.C)
    t.load("u_ptr", 2 * a.N * a.P * a.C)
    t.load("batch_ptr", 2 * a.N * blocks * a.C, 2 * a.C)
    t.load("slope_ptr", 2 * a.N * blocks * a.C)
    t.load("planes_ptr", 4 * a.N * blocks * a.C)
    t.store("du_ptr")
    return a.N * blocks * cdiv(a.C, a.BLOCK_C)


def _input_grad(a: SimpleNamespace, t: Tally) -> int:
    group, outputs, redundant = a.CR // a.G, a.CO // a.G, a.C - a.CR
    group_blocks = a.G * cdiv(group, a.BLOCK_C)
    c_blocks = group_blocks + cdiv(redundant, a.BLOCK_C)

    def along(axis: str, size: int, out: int) -> tuple[Reach, Reach]:
        """Output positions that the centre taps, and all taps, bring to the input positions."""
        kernel, stride, padding, dilation, centre = _window(a, axis)
        shifted = np.subtract.outer(np.arange(size) + padding, np.arange(kernel) * dilation)
        return _reach((np.arange(size) - centre) // stride, out), _reach(shifted[shifted % stride == 0] // stride, out)

    pool, taps = (_area(*axes) for axes in zip(along("H", a.H, a.HO), along("W", a.W, a.WO), strict=True))
    batch = a.dx_ptr.shape[0]
    phases = a.STRIDE_H * a.STRIDE_W
    blocks = batch * cdiv(a.phase_pixels, a.BLOCK_PIX)  # of a phase; a tap reaches one phase
    t.load(
        "grad_ptr",
        batch * (c_blocks * a.CO * pool.reads + group_blocks * outputs * taps.reads),
        batch * a.CO * (pool.united(taps) + (0 if a.GATED or redundant == 0 else pool.touched)),
    )
    t.load("gwc_ptr", blocks * a.KH * a.KW * a.CO * group)
    t.load("pwc_ptr", blocks * phases * a.CO * a.CR)
    t.load("redundant_ptr", blocks * phases * a.CO * redundant)
    vectors = blocks * (phases * c_blocks * a.CO + a.KH * a.KW * group_blocks * outputs)
    for name in ("ratio_ptr", "shift_ptr"):
        t.load(name, vectors if a.GATED else 0)
    t.store("dx_ptr")
    steps = phases * c_blocks * cdiv(a.CO, a.BLOCK_CO) + a.KH * a.KW * group_blocks * cdiv(outputs, a.BLOCK_CO)
    t.multiply(_precision(a.grad_ptr, a.PRECISION), blocks * steps, a.BLOCK_PIX, a.BLOCK_C, a.BLOCK_CO)
    return blocks * phases * c_blocks


def _pool_windows(a: SimpleNamespace, t: Tally) -> int:
    rows, columns = (
        _reach(np.add.outer(np.arange(outputs) * stride + centre, np.arange(stride)), size)
        for outputs, stride, centre, size in (
            (a.HO, a.STRIDE_H, a.CENTRE_H, a.H),
            (a.WO, a.STRIDE_W, a.CENTRE_W, a.W),
        )
    )
    batch, window = a.pixels // (a.HO * a.WO), _area(rows, columns)
    t.load("x_ptr", batch * a.C * window.reads, batch * a.C * window.touched)
    t.store("pooled_ptr")
    return cdiv(a.pixels, a.BLOCK_PIX) * cdiv(a.C, a.BLOCK_C)


def _weight_grad(a: SimpleNamespace, t: Tally) -> int:
    group, redundant = a.CR // a.G, a.C - a.CR
    co_blocks = cdiv(a.CO // a.G, a.BLOCK_CO)
    weights = {"redundant_ptr": redundant, "pwc_ptr": a.CR, "gwc_ptr": a.KH * a.KW * group}
    k_blocks = cdiv(redundant, a.BLOCK_C) + cdiv(a.CR, a.BLOCK_C) + a.KH * a.KW * cdiv(group, a.BLOCK_C)
    batch, splits = a.units // a.SLICES, a.partial_ptr.shape[0]
    start = np.arange(a.SLICES) * a.slice_pixels
    pixels = np.clip(np.minimum(start + a.slice_pixels, a.HO * a.WO) - start, 0, None)
    taps, pool = tap_area(a), _pool(a)
    t.load("grad_ptr", k_blocks * batch * a.CO * int(pixels.sum()))
    if a.STRIDE_H * a.STRIDE_W == 1:
        pooled = 0
        t.load(
            "x_ptr",
            batch * co_blocks * (a.C * a.G * pool.reads + a.CR * taps.reads),
            batch * (a.CR * pool.united(taps) + redundant * pool.touched),
        )
    else:
        pooled = batch * co_blocks * a.C * a.G * a.HO * a.WO
        t.load("x_ptr", batch * co_blocks * a.CR * taps.reads, batch * a.CR * taps.touched)
    t.load("pooled_ptr", pooled)
    for name, columns in weights.items():
        t.load(name, a.units * a.CO * columns if a.GATED else 0)
    t.load("ratio_ptr", k_blocks * a.units * a.CO if a.GATED else 0)
    t.store("inner_ptr", None if a.GATED else 0)
    t.store("partial_ptr")
    steps = k_blocks * a.G * co_blocks * batch * int(cdiv(pixels, a.BLOCK_PIX).sum())
    t.multiply(_precision(a.grad_ptr, a.PRECISION), steps, a.BLOCK_CO, a.BLOCK_C, a.BLOCK_PIX)
    return k_blocks * a.G * co_blocks * splits


def _gate_grad(a: SimpleNamespace, t: Tally) -> int:
    t.load("inner_ptr", a.K_BLOCKS * a.N * a.SLICES * a.CO)
    t.load("ratio_ptr", a.N * a.CO)
    t.load("grad_ptr", a.N * a.P * a.CO if a.BRANCH_BIAS else 0)
    t.load("branch_bias_ptr", 2 * a.N * a.CO if a.BRANCH_BIAS else 0)
    t.store("shift_ptr")
    t.store("gate_ptr", None if a.PREPARE else 0)
    t.store("terms_ptr", None if a.BRANCH_BIAS else 0)
    return a.N * cdiv(a.CO, a.BLOCK_CO)


def _finish_weights(a: SimpleNamespace, t: Tally) -> int:
    group, outputs, redundant, taps = a.CR // a.G, a.CO // a.G, a.C - a.CR, a.KH * a.KW
    co_blocks = a.G * cdiv(outputs, a.BLOCK_CO)
    c_blocks, redundant_blocks = cdiv(group, a.BLOCK_C), cdiv(redundant, a.BLOCK_C)
    k_blocks = redundant_blocks + cdiv(a.CR, a.BLOCK_C) + taps * c_blocks
    programs = co_blocks * k_blocks
    shifts = k_blocks * a.N * a.CO if a.GATED else 0
    means = co_blocks * a.N if a.GATED else 0
    t.load("partial_ptr", a.SPLITS * a.CO * (a.C + taps * group))
    t.load("tap_mean_ptr", means * taps * group)
    t.load("pool_mean_ptr", means * a.C)
    t.load("terms_ptr", 2 * a.N * a.CO if a.BRANCH_BIAS else 0)
    t.store("d_gwc_ptr")
    t.store("d_pwc_ptr")
    t.store("d_redundant_ptr", None if redundant else 0)
    t.store("d_branch_bias_ptr", None if a.BRANCH_BIAS else 0)
    if a.GATED:
        halves = a.PRECISION != "ieee" and tensor_of(a.tap_mean_ptr).element_size() < 4
        precision = "tf32x2" if halves else a.PRECISION
        t.multiply(precision, programs * cdiv(a.N, a.BLOCK_N), a.BLOCK_CO, a.BLOCK_C, a.BLOCK_N)

    weights = {"gwc_ptr": taps * group, "pwc_ptr": a.CR, "redundant_ptr": redundant}
    reads, again = 0, dict.fromkeys(weights, 0)
    if a.PREPARE:
        folded = a.STRIDE**2 - 1  # taps that a weight is folded into, after the first
        again["pwc_ptr"] = folded * outputs * a.MERGE * a.CR
        again["redundant_ptr"] = folded * a.CO * redundant if a.MIXED else 0
        sample_blocks = cdiv(a.N, a.BLOCK_PLANE_N)
        group_blocks, redundant_blocks = a.G * cdiv(group, a.BLOCK_PLANE), cdiv(redundant, a.BLOCK_PLANE)
        planes = sample_blocks * (group_blocks + redundant_blocks)
        shifts += a.N * ((group_blocks + redundant_blocks) * 2 * a.CO + group_blocks * outputs)
        step = a.BLOCK_PLANE_CO
        t.multiply("halfx2", planes * cdiv(a.CO, 2 * step), a.BLOCK_PLANE_N, a.BLOCK_PLANE, 2 * step)
        steps = sample_blocks * group_blocks * cdiv(outputs, step)
        t.multiply("halfx2", steps, a.BLOCK_PLANE_N, 16 * a.BLOCK_PLANE, step)
        programs += planes + cdiv(a.ROWS, a.BLOCK_ROWS) * cdiv(a.C, a.BLOCK_COLUMNS)
        reads = sample_blocks + 1  # of the weights: for the planes of every block of samples, and for packing
    t.load("shift_ptr", shifts)
    for name, columns in weights.items():
        t.load(name, reads * a.CO * columns + again[name])
    t.store("packed_ptr", None if a.PREPARE else 0)
    t.store("constant_ptr", None if a.PREPARE else 0)
    return programs


def _input_grad_descriptor(a: SimpleNamespace, t: Tally) -> int:
    merged_outputs = a.CO // a.G * a.MERGE
    redundant = sum(first >= a.CR for first in range(0, a.C, a.BLOCK_C)) * a.BLOCK_C
    representative = a.C - redundant  # and in a mixed tile the redundant channels beside them

    shifts = (1, 0, -1) if a.STRIDE == 1 else (1, 0, 0)
    phases = a.STRIDE**2
    outside = len(set(shifts)) - 1  # taps that are outside at an end of the axis

    def along(size: int, block: int) -> tuple[int, int, int]:
        """Positions inside that the taps of all phases read, taps visited, and how many of them ever are."""
        starts = _starts(size, block)
        inside = sum(_boxes(starts + shift, block, size) for shift in shifts)
        visited = 3 * len(starts) - (outside if block == 1 else 0)
        return inside, visited, 3 - outside if block == size == 1 else 3

    rows, columns = along(a.H, a.BLOCK_H), along(a.W, a.BLOCK_W)
    tap_reads, visited, ever = (row * column for row, column in zip(rows, columns, strict=True))
    places, sample_blocks = a.TILES_H * a.TILES_W, cdiv(a.N, a.BLOCK_N)
    point = 0 if a.MIXED else a.CO - merged_outputs  # output channels that representative ones sum over at one pixel
    blocks, redundant_blocks = representative // a.BLOCK_C, redundant // a.BLOCK_C
    t.load(
        "grad_desc",
        a.N
        * (blocks * (phases * point * a.H * a.W + merged_outputs * tap_reads) + redundant_blocks * a.CO * a.H * a.W),
    )
    depth, redundant_depth = phases * point * places + merged_outputs * visited, a.CO * places
    t.load(
        "weight_desc",
        sample_blocks * (representative * depth + redundant * redundant_depth),
        representative * (point + merged_outputs * ever) + redundant * a.CO,
    )
    gates = 2 if a.TRANSPOSED and a.MIXED else 1
    t.load("gate_desc", gates * a.N * (blocks * depth + redundant_blocks * redundant_depth))
    divided = a.TRANSPOSED and tensor_of(a.weight_desc).dtype == torch.float16
    largest = gates * a.N * places * (phases * blocks + redundant_blocks)
    t.load("largest_ptr", divided * largest)
    if a.STRIDE == 1:
        edges, channels = 2 * a.TILES_H + 2 * a.TILES_W + 4, a.C if a.MIXED else representative
        t.load("constant_ptr", a.N * (a.C * places + channels * edges), a.N * (a.C + 8 * channels))
    else:
        planes = a.N * (9 * representative + redundant)
        t.load("constant_ptr", planes * places, planes)
    t.store("dx_desc")
    pixels = a.BLOCK_N * a.BLOCK_H * a.BLOCK_W
    steps = sample_blocks * (blocks * depth + redundant_blocks * redundant_depth)
    t.multiply(_precision(a.grad_desc), steps, pixels, a.BLOCK_C)
    return sample_blocks * places * (phases * blocks + redundant_blocks)


def _weight_grad_descriptor(a: SimpleNamespace, t: Tally) -> int:
    group = a.CR // a.G
    height = a.grad_desc.shape[1]
    batch, splits = a.units // a.SLICES, a.partial_ptr.shape[0]
    co_blocks, pointwise, per_tap = a.CO // a.BLOCK_CO, a.C // a.BLOCK_C, group * a.MERGE // a.BLOCK_C
    k_tiles = pointwise + (8 if a.STRIDE == 1 else 9) * per_tap
    rows, columns = _starts(a.SLICES * a.slice_height, a.BLOCK_H), _starts(a.W, a.BLOCK_W)
    shifts = (-1, 0, 1) if a.STRIDE == 1 else (-1, 0, 0)
    inside = np.outer(
        [_boxes(rows + shift, a.BLOCK_H, height) for shift in shifts],
        [_boxes(columns + shift, a.BLOCK_W, a.W) for shift in shifts],
    )
    centre, taps = int(inside[1, 1]), int(inside.sum())
    t.load("grad_desc", k_tiles * batch * a.CO * centre)
    of_a_tile = batch * co_blocks * a.BLOCK_C
    if a.STRIDE == 1:
        t.load("x_desc", of_a_tile * (pointwise * centre + per_tap * (taps - centre)))
        t.load("pooled_desc", 0)
    else:
        t.load("x_desc", of_a_tile * per_tap * taps, batch * a.CR * 4 * centre)
        t.load("pooled_desc", of_a_tile * pointwise * centre)
    for name, width in {"gwc_ptr": 9 * group, "pwc_ptr": a.CR, "redundant_ptr": a.C - a.CR}.items():
        t.load(name, splits * a.CO * width)
    t.load("ratio_ptr", k_tiles * a.units * a.CO)
    t.store("inner_ptr")
    t.store("partial_ptr")
    steps = k_tiles * co_blocks * batch * len(rows) * len(columns)
    t.multiply(_precision(a.grad_desc), steps, a.BLOCK_CO, a.BLOCK_C, a.BLOCK_H * a.BLOCK_W)
    return k_tiles * co_blocks * splits


FORMULAS: dict[str, Callable[[SimpleNamespace, Tally], int]] = {
    formula.__name__.removeprefix("_"): formula
    for formula in (
        _branch_forward,
        _onepass_forward,
        _window_statistics,
        _gate_planes,
        _onepass_descriptor,
        _branches_forward,
        _sample_moments,
        _norm_gate,
        _norm_blend,
        _norm_sums,
        _norm_coefficients,
        _norm_blend_grad,
        _fusion_statistics,
        _fusion_blend,
        _fusion_blend_grad,
        _input_grad,
        _pool_windows,
        _weight_grad,
        _gate_grad,
        _finish_weights,
        _input_grad_descriptor,
        _weight_grad_descriptor,
    )
}
"""By kernel. Each tallies a launch and returns how many programs it should have."""
