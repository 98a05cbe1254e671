"""Config tables, what is pruned from them, and the keys by which a choice is remembered.

Keys name what belongs to a layer (channels, groups, window); batch, height and width are run-time arguments, so a
new input size tunes nothing. What is compiled in of it is in how many parts sums are made, at most 16, one of three
blocks of columns, whether samples are few, and a descriptor kernel's tile, so it compiles a few kernels at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
from triton import knobs

from .arithmetic import next_power_of_2


def config(num_warps: int, num_stages: int, **blocks: int) -> triton.Config:
    """A row of a table."""
    return triton.Config(blocks, num_warps=num_warps, num_stages=num_stages)


class Table(tuple[triton.Config, ...]):
    """Rows by how products are formed; each of them once, and last the narrowest, which all share.

    Args:
        half: for float16 and bfloat16.
        tf32: for float32 on tensor cores.
        float32: for float32 without.
    """

    half: frozenset[Any]
    tf32: frozenset[Any]
    float32: frozenset[Any]

    def __new__(
        cls, half: Sequence[triton.Config], tf32: Sequence[triton.Config], float32: Sequence[triton.Config]
    ) -> Table:
        every = (*half[:-1], *tf32[:-1], *float32[:-1], half[-1])
        table = super().__new__(cls, {blocks(row): row for row in every}.values())
        table.half, table.tf32, table.float32 = (frozenset(map(blocks, rows)) for rows in (half, tf32, float32))
        assert blocks(half[-1]) in table.tf32 & table.float32
        return table

    def of(self, configs: Sequence[triton.Config], arguments: dict[str, Any]) -> list[triton.Config]:
        """Those of ``configs`` that are for a kernel's arguments; all, if none is of this table."""
        if itemsize(arguments) < 4:
            rows = self.half
        else:
            rows = self.float32 if arguments["PRECISION"] == "ieee" else self.tf32
        return [config for config in configs if blocks(config) in rows] or list(configs)


def blocks(config: triton.Config) -> Any:
    """What tells a row from others."""
    return tuple(sorted(config.kwargs.items())), config.num_warps, config.num_stages


def itemsize(arguments: dict[str, Any]) -> int:
    """Bytes of an element of the maps that a kernel reads."""
    return arguments["grad_ptr" if "grad_ptr" in arguments else "x_ptr"].dtype.itemsize


def autotuned(table: Sequence[triton.Config], key: Sequence[str], prune: Callable[..., list[triton.Config]]):
    """``triton.autotune`` over ``table``, or its last row where kernels are interpreted.

    Timings are kept in Triton's cache on disk. The interpreter cannot time, so it takes the last row, which every table
    keeps for the smallest blocks.
    """
    configs = [table[-1]] if knobs.runtime.interpret else list(table)

    def early_config_prune(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
        if isinstance(table, Table):
            configs = table.of(configs, {**named_args, **kwargs})
        return prune(configs, named_args, **kwargs)

    pruning = {"early_config_prune": early_config_prune}
    return triton.autotune(configs, key=list(key), prune_configs_by=pruning, cache_results=True)


def fits(block: int, size: int, smallest: int) -> bool:
    """A block is wasted once half of it lies beyond ``size``; the smallest is always allowed."""
    return block <= max(smallest, next_power_of_2(size))


def spills(candidate: triton.Config, itemsize: int, scattered: bool, window: int) -> bool:
    """64 accumulators a thread leave few registers.

    The addresses and masks of channels that are no multiple of 16, one for each element, overflow those that are left,
    by 160 to 232 bytes on sm_90 and sm_100; so does pooling over more than four pixels. Eight warps share all that
    among more threads and just hold it, unless float32 is pooled.

    Args:
        scattered: channels of a group are no multiple of 16.
        window: pixels that a point-wise convolution averages.
    """
    sizes = sorted(candidate.kwargs.values())
    accumulators = sizes[-1] * sizes[-2] // (32 * candidate.num_warps)
    if accumulators < 64:
        return False
    if candidate.num_warps < 8:
        return scattered or window > 4
    return itemsize == 4 and window > 1


def overflows_shared_memory(candidate: triton.Config, itemsize: int) -> bool:
    """The tiles in flight exceed an A100's 163 KiB; the two operands are at most ``max x min`` of the blocks each."""
    blocks = candidate.kwargs.values()
    return candidate.num_stages * 2 * max(blocks) * min(blocks) * itemsize > 160 * 1024


def prune_layer(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """Keep the configs whose channel blocks fit a group, and that the dtype leaves registers and memory for."""
    arguments = {**named_args, **kwargs}
    sizes = group_sizes(arguments)
    bytes_each = itemsize(arguments)
    scattered = are_scattered(arguments)
    window = arguments["STRIDE_H"] * arguments["STRIDE_W"]
    kept = [
        c
        for c in configs
        if all(fits(c.kwargs[name], size, 16) for name, size in sizes.items() if name in c.kwargs)
        and not spills(c, bytes_each, scattered, window)
        and not overflows_shared_memory(c, bytes_each)
    ]
    return kept or [configs[-1]]


def group_sizes(arguments: dict[str, Any]) -> dict[str, int]:
    """Channels of a group by the name of their block."""
    return {name: arguments[size] // arguments["G"] for name, size in (("BLOCK_CO", "CO"), ("BLOCK_C", "CR"))}


def are_scattered(arguments: dict[str, Any]) -> bool:
    """Whether channels of a group are no multiple of 16: then addresses and masks are of single elements."""
    return any(size % 16 for size in group_sizes(arguments).values())


def prune_forward(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """As :func:`prune_layer`, less what spills on sm_90: 64 scattered outputs of float32 without tensor cores."""
    return prune_layer(narrow_if_scattered(configs, {**named_args, **kwargs}, 32), named_args, **kwargs)


def prune_branches(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """As :func:`prune_forward`, of 32 outputs already: their moments take registers too."""
    return prune_layer(narrow_if_scattered(configs, {**named_args, **kwargs}, 16), named_args, **kwargs)


def narrow_if_scattered(configs: list[triton.Config], arguments: dict[str, Any], outputs: int) -> list[triton.Config]:
    """Those of up to so many outputs, of float32 that is multiplied without tensor cores where channels are
    scattered; else all."""
    if itemsize(arguments) < 4 or arguments["PRECISION"] != "ieee" or not are_scattered(arguments):
        return configs
    return [c for c in configs if c.kwargs["BLOCK_CO"] <= outputs]


def prune_input_grad(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """As :func:`prune_layer`, less what spills: at a stride the wider blocks on sm_90 and sm_100, and of channels that
    are scattered 32 beside 128 pixels on sm_100."""
    arguments = {**named_args, **kwargs}
    strided, scattered = arguments["STRIDE_H"] * arguments["STRIDE_W"] > 1, are_scattered(arguments)

    def is_clean(block: dict[str, int]) -> bool:
        if strided and block["BLOCK_C"] > 32:
            return False
        return not (scattered and block["BLOCK_C"] == 32 and block["BLOCK_PIX"] == 128)

    return prune_layer([c for c in configs if is_clean(c.kwargs)], named_args, **kwargs)


def prune_weight_grad(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """As :func:`prune_layer`, less what spills.

    In half precision, of channels that are scattered, steps of 16 and 64 pixels do on sm_100. Of float32 without tensor
    cores steps of 16 pixels do at a stride, on sm_80 and sm_100, and those of 32 else, on sm_90. Beside 64 input
    channels 32 outputs of 32 pixels in four warps do on sm_90, and the narrowest block, which is for narrow layers, on
    each of them in one layer or another.
    """
    arguments = {**named_args, **kwargs}
    strided = arguments["STRIDE_H"] * arguments["STRIDE_W"] > 1
    scattered_halves = are_scattered(arguments) and itemsize(arguments) < 4
    wide = arguments["BLOCK_C"] >= 64
    narrow_outputs = arguments["CO"] // arguments["G"] <= 16

    def is_clean(candidate: triton.Config) -> bool:
        pixels, outputs = candidate.kwargs["BLOCK_PIX"], candidate.kwargs["BLOCK_CO"]
        if scattered_halves and pixels != 32:
            return False
        if (pixels, outputs) == (16, 64) or (candidate.num_warps == 8 and outputs == 32):
            return strided == (pixels == 32)
        return not wide or ((pixels, outputs) != (32, 32) and (outputs > 16 or narrow_outputs))

    return prune_layer([c for c in configs if is_clean(c)] or configs, named_args, **kwargs)


def prune_channels(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """Keep the configs whose channel block fits."""
    channels = {**named_args, **kwargs}["C"]
    return [c for c in configs if fits(c.kwargs["BLOCK_C"], channels, 16)]


def prune_gate(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """The longest steps that there are channels for, 128 only in half precision at stride 1: float32 spills them, and
    at a stride sums are loaded twice; either overflows a small GPU's shared memory.

    Not tuned: few samples and many run different code, and the key knows no batch.
    """
    arguments = {**named_args, **kwargs}
    long = arguments["POOL_ROW"] < arguments["TAPS"] and arguments["pwc_ptr"].dtype.itemsize < 4
    return prune_channels([c for c in configs if long or c.kwargs["BLOCK_C"] <= 64], named_args, **kwargs)[:1]


BRANCH_KEY = ("CR", "CO", "G", "KH", "KW", "STRIDE_H", "STRIDE_W", "PRECISION")
LAYER_KEY = ("C", *BRANCH_KEY)

NARROWEST = config(4, 3, BLOCK_PIX=64, BLOCK_CO=16, BLOCK_C=16)

# Float32 without tensor cores passes operands through registers, and leaves none for 32 accumulators a thread on sm_80.
FORWARD = Table(
    half=(
        config(8, 3, BLOCK_PIX=128, BLOCK_CO=128, BLOCK_C=32),
        config(4, 4, BLOCK_PIX=128, BLOCK_CO=64, BLOCK_C=32),
        config(8, 3, BLOCK_PIX=64, BLOCK_CO=64, BLOCK_C=32),
        config(4, 3, BLOCK_PIX=128, BLOCK_CO=32, BLOCK_C=16),
        NARROWEST,
    ),
    tf32=(
        config(8, 3, BLOCK_PIX=128, BLOCK_CO=128, BLOCK_C=16),
        config(8, 3, BLOCK_PIX=64, BLOCK_CO=64, BLOCK_C=16),
        config(4, 3, BLOCK_PIX=128, BLOCK_CO=32, BLOCK_C=16),
        NARROWEST,
    ),
    float32=(
        config(8, 3, BLOCK_PIX=64, BLOCK_CO=64, BLOCK_C=16),
        config(4, 3, BLOCK_PIX=64, BLOCK_CO=32, BLOCK_C=16),
        NARROWEST,
    ),
)

MOMENT_PIXELS = 128
"""BLOCK_PIX of the branches that leave moments. Not tuned: it decides the size of a buffer, allocated before."""

# No wider: the moments of the columns take as many registers again as the accumulator, two for an element of float32.
NARROWEST_MOMENTS = config(8, 3, BLOCK_PIX=MOMENT_PIXELS, BLOCK_CO=16, BLOCK_C=16)
BRANCHES = Table(
    half=(
        config(8, 3, BLOCK_PIX=MOMENT_PIXELS, BLOCK_CO=64, BLOCK_C=32),
        config(8, 3, BLOCK_PIX=MOMENT_PIXELS, BLOCK_CO=32, BLOCK_C=32),
        NARROWEST_MOMENTS,
    ),
    tf32=(config(8, 3, BLOCK_PIX=MOMENT_PIXELS, BLOCK_CO=32, BLOCK_C=32), NARROWEST_MOMENTS),
    float32=(config(8, 2, BLOCK_PIX=MOMENT_PIXELS, BLOCK_CO=32, BLOCK_C=32), NARROWEST_MOMENTS),
)

NARROWEST_INPUTS = config(4, 3, BLOCK_PIX=64, BLOCK_C=16, BLOCK_CO=16)
INPUT_GRAD = Table(
    half=(
        config(8, 3, BLOCK_PIX=128, BLOCK_C=128, BLOCK_CO=32),
        config(4, 4, BLOCK_PIX=128, BLOCK_C=64, BLOCK_CO=32),
        config(4, 4, BLOCK_PIX=64, BLOCK_C=64, BLOCK_CO=32),
        config(4, 3, BLOCK_PIX=128, BLOCK_C=32, BLOCK_CO=32),
        NARROWEST_INPUTS,
    ),
    tf32=(
        config(8, 3, BLOCK_PIX=128, BLOCK_C=128, BLOCK_CO=16),
        config(8, 3, BLOCK_PIX=64, BLOCK_C=64, BLOCK_CO=32),
        config(4, 3, BLOCK_PIX=128, BLOCK_C=32, BLOCK_CO=32),
        NARROWEST_INPUTS,
    ),
    float32=(
        config(8, 3, BLOCK_PIX=64, BLOCK_C=64, BLOCK_CO=16),
        config(4, 3, BLOCK_PIX=32, BLOCK_C=32, BLOCK_CO=16),
        NARROWEST_INPUTS,
    ),
)

# Two accumulators and a tile of weights: eight warps for what four carry elsewhere.
NARROWEST_WEIGHTS = config(4, 3, BLOCK_PIX=32, BLOCK_CO=16)
WEIGHT_GRAD = Table(
    half=(
        config(8, 3, BLOCK_PIX=64, BLOCK_CO=64),
        config(8, 3, BLOCK_PIX=32, BLOCK_CO=64),
        config(4, 3, BLOCK_PIX=32, BLOCK_CO=32),
        config(4, 3, BLOCK_PIX=16, BLOCK_CO=32),
        NARROWEST_WEIGHTS,
    ),
    tf32=(
        config(8, 3, BLOCK_PIX=32, BLOCK_CO=64),
        config(4, 3, BLOCK_PIX=16, BLOCK_CO=32),
        NARROWEST_WEIGHTS,
    ),
    float32=(
        config(8, 3, BLOCK_PIX=16, BLOCK_CO=64),
        config(8, 3, BLOCK_PIX=16, BLOCK_CO=32),
        config(8, 2, BLOCK_PIX=32, BLOCK_CO=32),
        NARROWEST_WEIGHTS,
    ),
)


def weight_grad_channels(channels_per_group: int) -> int:
    """BLOCK_C of the weight gradient. Not tuned: it decides the size of a buffer, which is allocated before."""
    return min(64, max(16, next_power_of_2(channels_per_group)))


def weight_blocks(outputs: int, channels: int) -> tuple[int, int]:
    """BLOCK_CO and BLOCK_C of the reductions over weights, for a group's channels: small, for each waits for memory,
    until there would be more of them than run at a time."""
    most = 64 if min(outputs, channels) >= 128 else 32
    block_co, block_c = (min(most, max(16, next_power_of_2(size))) for size in (outputs, channels))
    return block_co, block_c


def statistics_blocks(width: int, channels: int, itemsize: int) -> tuple[int, int]:
    """BLOCK_W and BLOCK_C of the statistics.

    Not tuned, for they depend on the width: an H200 finds this within a twentieth of the fastest, where there was
    anything to choose. What is scattered spills 128 channels, float32 half as many elements or 64 channels. A symbol is
    any width: a graph that asked it would be for some widths only.
    """
    columns = 64 if not isinstance(width, int) or width > 32 else 32 if width > 16 else 16
    most = 4096 // columns
    if itemsize == 4:
        most //= 2
    widest = min(most, 64 if itemsize == 4 or channels % 16 else 128)
    return columns, min(widest, max(16, next_power_of_2(channels)))


GATE_KEY = ("C", "CR", "CO", "G", "TAPS", "POOL_ROW", "PRECISION")

# A step takes as long as memory takes to answer, so the longer ones the better: an H200 is three times as fast with 128
# channels a step as with 16.
GATE = (
    config(4, 3, BLOCK_N=16, BLOCK_CO=32, BLOCK_C=128),
    config(4, 3, BLOCK_N=16, BLOCK_CO=16, BLOCK_C=64),
    config(2, 2, BLOCK_N=16, BLOCK_CO=16, BLOCK_C=16),
)

FUSION_KEY = ("C",)

FUSION = (
    config(4, 2, BLOCK_PIX=32, BLOCK_C=128),
    config(4, 2, BLOCK_PIX=64, BLOCK_C=64),
    config(4, 2, BLOCK_PIX=128, BLOCK_C=32),
    config(4, 2, BLOCK_PIX=64, BLOCK_C=16),
)

# Two maps are written, not one.
FUSION_GRAD = (
    config(4, 2, BLOCK_PIX=32, BLOCK_C=128),
    config(4, 2, BLOCK_PIX=32, BLOCK_C=64),
    config(4, 2, BLOCK_PIX=64, BLOCK_C=32),
    config(4, 2, BLOCK_PIX=64, BLOCK_C=16),
)

# Five accumulators.
NORM_SUMS = (
    config(4, 2, BLOCK_PIX=16, BLOCK_C=128),
    config(4, 2, BLOCK_PIX=32, BLOCK_C=64),
    config(4, 2, BLOCK_PIX=64, BLOCK_C=32),
    config(4, 2, BLOCK_PIX=32, BLOCK_C=16),
)
