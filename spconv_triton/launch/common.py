"""What every launch needs: layouts, allocation, and the constants of a layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..dispatch import capability, has_tf32
from ..geometry import Geometry
from ..kernels.arithmetic import cdiv

LARGEST = 2**31 - 2**12
"""Kernels number pixels, and what they keep of samples, in 32 bits, and step a block beyond the last."""

TARGET_PROGRAMS = 512
"""How many programs a reduction is split into at least: a few for each of a large GPU's 80 to 150 processors. Fixed, so
that the order of summation, and with it every bit of the result, does not depend on the device."""

FEW = 8
"""Up to so many samples leave processors idle: then what counts is how long a kernel waits, not how much it does."""

Grid = Callable[[dict[str, Any]], tuple[int, ...]]

Plan = TypeVar("Plan")


def remembered(plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """Decorator of what depends on sizes alone, and takes longer than to look it up.

    While a graph is traced sizes may be symbols, which have no hash.
    """
    found = functools.lru_cache(maxsize=1024)(plan)

    @functools.wraps(plan)
    def look_up(*sizes: Any) -> Plan:
        try:
            hash(sizes)
        except TypeError:
            return plan(*sizes)
        return found(*sizes)

    return look_up


class Kernels(Protocol):
    """Kernels that take some layers only: a module with these two functions."""

    def can_run(self, x: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry) -> bool:
        """Whether they suit the layer and the device of ``x``."""

    def supports(self, x: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry) -> bool:
        """Whether they compute the layer at all."""


def use_descriptors(
    path: str, kernels: Kernels, x: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry
) -> bool:
    """Whether a layer goes to ``kernels`` over descriptors rather than to the flat ones, which take any layer.

    Raises:
        ValueError: an unknown path, or ``"descriptor"`` for a layer that they do not compute.
    """
    if path == "auto":
        return kernels.can_run(x, weight_gwc, weight_pwc, geometry)
    if path not in ("flat", "descriptor"):
        raise ValueError(f"path must be 'auto', 'flat' or 'descriptor', got {path!r}")
    if path == "descriptor" and not kernels.supports(x, weight_gwc, weight_pwc, geometry):
        raise ValueError(f"path='descriptor' does not take a layer of {geometry} on {list(x.shape)} in {x.dtype}")
    return path == "descriptor"


def channels_last(x: Tensor) -> Tensor:
    """``x`` with its channels next to each other and no gaps; a copy unless it is already."""
    return x.contiguous(memory_format=torch.channels_last)


def pixel_major(x: Tensor) -> tuple[Tensor, int]:
    """``x`` and the distance of its pixels, in elements; a copy unless they are evenly spaced and channels adjacent.

    A slice of the channels of a channels_last tensor is read in place. Axes of one element may have any stride.
    """
    _, channels, height, width = x.shape
    if x.is_contiguous(memory_format=torch.channels_last):
        return x, channels
    spacing = channels
    for axis, pixels in ((0, height * width), (2, width), (3, 1)):
        if x.shape[axis] > 1:
            spacing = x.stride(axis) // pixels
    evenly = all(
        x.shape[axis] == 1 or x.stride(axis) == step
        for axis, step in ((1, 1), (0, height * width * spacing), (2, width * spacing), (3, spacing))
    )
    return (x, spacing) if evenly else (channels_last(x), channels)


def pixel_arguments(x: Tensor, output_size: tuple[int, int], name: str = "x") -> tuple[int, int, int, int, int]:
    """Output pixels of the batch, and H, W, H_out, W_out; ``name`` is that of ``x`` in the caller's arguments.

    Raises:
        ValueError: more pixels than 32 bits can number (elements are counted in 64).
    """
    batch, _, height, width = x.shape
    pixels = batch * output_size[0] * output_size[1]
    if max(pixels, batch * height * width) > LARGEST:
        raise ValueError(f"{name} must have at most {LARGEST} pixels in a batch, got {list(map(int, x.shape))}")
    return pixels, height, width, *output_size


def check_samples(batch: int, kept: int, name: str, shape: tuple[int, ...]) -> None:
    """Refuse more samples than 32 bits can number what kernels keep of all of them.

    Args:
        kept: numbers of each sample.
        name, shape: of the tensor that has the samples.

    Raises:
        ValueError: too many.
    """
    if batch * kept > LARGEST:
        most = f"at most {LARGEST // kept} samples in a batch, of {kept} numbers each"
        raise ValueError(f"{name} must have {most}, got {list(map(int, shape))}")


def empty_channels_last(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Uninitialised [N, channels, height, width] of the dtype and device of ``x``.

    By its strides: Inductor writes NaN to every element of what ``torch.empty`` makes in a memory format.
    """
    strides = (channels * height * width, 1, width * channels, channels)
    return torch.empty_strided((x.shape[0], channels, height, width), strides, dtype=x.dtype, device=x.device)


def empty_output(x: Tensor, weight_gwc: Tensor, geometry: Geometry) -> Tensor:
    """Uninitialised [N, M, H_out, W_out], channels_last."""
    return empty_channels_last(x, weight_gwc.shape[0], *geometry.output_size(x.shape[2], x.shape[3]))


def dot_precision(x: Tensor) -> str:
    """How float32 products are computed: as PyTorch's setting for convolutions says, where the GPU of ``x`` can."""
    if x.dtype != torch.float32 or not has_tf32(x.device):
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def statistics_precision(x: Tensor) -> str:
    """How products of float32 statistics are computed: in parts, on NVIDIA's tensor cores, if the layer is."""
    if capability(x.device) is None or (x.dtype == torch.float32 and dot_precision(x) == "ieee"):
        return "ieee"
    return "tf32x3"


def is_hopper(x: Tensor) -> bool:
    """Whether the GPU of ``x`` multiplies by warp groups, asynchronously (compute capability 9.x)."""
    found = capability(x.device)
    return found is not None and found[0] == 9


def can_overlap(x: Tensor) -> bool:
    """Whether kernels of a layer begin while the one ahead still runs: of few samples, which leave processors idle.

    An H200 takes a sixth less for one image so, and up to a third more for 128. It takes 9.0 or newer.
    """
    found = capability(x.device)
    batch = x.shape[0]  # a symbol may not be asked
    return found is not None and found[0] >= 9 and isinstance(batch, int) and batch <= FEW


def window_constants(geometry: Geometry) -> dict[str, int]:
    """The window, compiled into a layer's kernels."""
    return {
        "KH": geometry.kernel_size[0],
        "KW": geometry.kernel_size[1],
        "STRIDE_H": geometry.stride[0],
        "STRIDE_W": geometry.stride[1],
        "PAD_H": geometry.padding[0],
        "PAD_W": geometry.padding[1],
        "DILATION_H": geometry.dilation[0],
        "DILATION_W": geometry.dilation[1],
    }


def layer_constants(x: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry) -> dict[str, Any]:
    """Channels, groups, window and precision, compiled into a layer's kernels."""
    return {
        "CR": weight_pwc.shape[1],
        "CO": weight_gwc.shape[0],
        "G": geometry.groups,
        "PRECISION": dot_precision(x),
        **window_constants(geometry),
    }


def has_tile_hardware(x: Tensor) -> bool:
    """Whether the device of ``x`` has tensor-map loads and the warp-group products that descriptor kernels' tiles are
    made for.

    These are Hopper (9.0) and data-centre Blackwell (10.x): 12.x has the loads but neither the products nor the shared
    memory.
    """
    found = capability(x.device)
    return found is not None and found[0] in (9, 10)


def pixel_splits(batch: int, channels: int, pixels: int, most: int, least: int = 256) -> int:
    """In how many parts, up to ``most``, sums over a sample's pixels are made: enough programs to fill a GPU, each of
    64 channels and at least ``least`` pixels."""
    programs = batch * cdiv(channels, 64)
    return max(1, min(cdiv(TARGET_PROGRAMS, programs), cdiv(pixels, least), most))


def forward_grid(pixels: int, weight_gwc: Tensor, geometry: Geometry) -> Grid:
    def grid(meta: dict[str, Any]) -> tuple[int]:
        per_group = cdiv(weight_gwc.shape[0] // geometry.groups, meta["BLOCK_CO"])
        return (cdiv(pixels, meta["BLOCK_PIX"]) * geometry.groups * per_group,)

    return grid
