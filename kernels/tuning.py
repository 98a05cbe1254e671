"""Config tables, what is pruned from them, and the keys by which a choice is remembered.

Keys name what belongs to a layer (channels, groups, window); batch, height and width are run-time arguments, so a
new input size neither tunes nor compiles again.
"""

from collections.abc import Callable, Sequence

import triton
from triton import knobs


def config(num_warps: int, num_stages: int, **blocks: int) -> triton.Config:
    """A row of a table."""
    return triton.Config(blocks, num_warps=num_warps, num_stages=num_stages)


def autotuned(table: Sequence[triton.Config], key: Sequence[str], prune: Callable[..., list[triton.Config]]):
    """``triton.autotune`` over ``table``, or its last row where kernels are interpreted.

    Timings are kept in Triton's cache on disk. The interpreter cannot time, so it takes the last row, which every table
    keeps for the smallest blocks.
    """
    configs = [table[-1]] if knobs.runtime.interpret else list(table)
    return triton.autotune(configs, key=list(key), prune_configs_by={"early_config_prune": prune}, cache_results=True)


def fits(block: int, size: int, smallest: int) -> bool:
    """A block is wasted once half of it lies beyond ``size``; the smallest is always allowed."""
    return block <= max(smallest, triton.next_power_of_2(size))


def spills(candidate: triton.Config, itemsize: int, scattered: bool, window: int) -> bool:
    """64 accumulators a thread leave few registers.

    The wider operands of float32 overflow those of sm_80; so do the addresses and masks of channels that are no
    multiple of 16, one for each element, by 160 to 232 bytes on sm_90 and sm_100; so does pooling over more than four
    pixels. Eight warps share all that among more threads and just hold it, unless float32 is pooled.

    Args:
        scattered: channels of a group are no multiple of 16.
        window: pixels that a point-wise convolution averages.
    """
    blocks = sorted(candidate.kwargs.values())
    accumulators = blocks[-1] * blocks[-2] // (32 * candidate.num_warps)
    if accumulators < 64:
        return False
    if candidate.num_warps < 8:
        return itemsize == 4 or scattered or window > 4
    return itemsize == 4 and window > 1


def overflows_shared_memory(candidate: triton.Config, itemsize: int) -> bool:
    """The tiles in flight exceed an A100's 163 KiB; the two operands are at most ``max x min`` of the blocks each."""
    blocks = candidate.kwargs.values()
    return candidate.num_stages * 2 * max(blocks) * min(blocks) * itemsize > 160 * 1024


def prune_layer(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """Keep the configs whose channel blocks fit a group, and that the dtype leaves registers and memory for."""
    arguments = {**named_args, **kwargs}
    sizes = {name: arguments[size] // arguments["G"] for name, size in (("BLOCK_CO", "CO"), ("BLOCK_C", "CR"))}
    itemsize = arguments["grad_ptr" if "grad_ptr" in arguments else "x_ptr"].dtype.itemsize
    scattered = any(size % 16 for size in sizes.values())
    window = arguments["STRIDE_H"] * arguments["STRIDE_W"]
    kept = [
        c
        for c in configs
        if all(fits(c.kwargs[name], size, 16) for name, size in sizes.items() if name in c.kwargs)
        and not spills(c, itemsize, scattered, window)
        and not overflows_shared_memory(c, itemsize)
    ]
    return kept or [configs[-1]]


def prune_input_grad(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """As :func:`prune_layer`; and at a stride the wider blocks spill a little on sm_90 and sm_100."""
    arguments = {**named_args, **kwargs}
    strided = arguments["STRIDE_H"] * arguments["STRIDE_W"] > 1
    candidates = [c for c in configs if not strided or c.kwargs["BLOCK_C"] <= 32]
    return prune_layer(candidates, named_args, **kwargs)


def prune_weight_grad(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """As :func:`prune_layer`, less what spills into the loop on sm_80.

    Float32 without tensor cores passes operands through registers for all pixels of a step: 64 of them leave 3.7 KB a
    thread in local memory. At a stride the narrowest block spills beside 64 input channels, where a layer that has more
    outputs does not want it.
    """
    arguments = {**named_args, **kwargs}
    vectors = arguments["grad_ptr"].dtype.itemsize == 4 and arguments["PRECISION"] == "ieee"
    strided = arguments["STRIDE_H"] * arguments["STRIDE_W"] > 1
    wide = arguments["BLOCK_C"] >= 64 and arguments["CO"] // arguments["G"] > 16
    candidates = [
        c
        for c in configs
        if not (vectors and c.kwargs["BLOCK_PIX"] > 32) and not (strided and wide and c.kwargs["BLOCK_CO"] <= 16)
    ]
    return prune_layer(candidates or configs, named_args, **kwargs)


def prune_channels(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """Keep the configs whose channel block fits."""
    channels = {**named_args, **kwargs}["C"]
    return [c for c in configs if fits(c.kwargs["BLOCK_C"], channels, 16)]


def prune_statistics(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """As :func:`prune_channels`; float32 beside more than 16 rows of taps spills 64 x 64 into the loop on sm_80."""
    arguments = {**named_args, **kwargs}
    large = arguments["x_ptr"].dtype.itemsize == 4 and arguments["BLOCK_ROWS"] > 16
    candidates = [c for c in configs if not large or min(c.kwargs.values()) < 64]
    return prune_channels(candidates or configs, named_args, **kwargs)


BRANCH_KEY = ("CR", "CO", "G", "KH", "KW", "STRIDE_H", "STRIDE_W", "PRECISION")
LAYER_KEY = ("C", *BRANCH_KEY)

FORWARD = (
    config(8, 3, BLOCK_PIX=128, BLOCK_CO=128, BLOCK_C=32),
    config(4, 4, BLOCK_PIX=128, BLOCK_CO=64, BLOCK_C=32),
    config(4, 4, BLOCK_PIX=64, BLOCK_CO=64, BLOCK_C=32),
    config(4, 3, BLOCK_PIX=128, BLOCK_CO=32, BLOCK_C=16),
    config(4, 3, BLOCK_PIX=64, BLOCK_CO=16, BLOCK_C=16),
)

MOMENT_PIXELS = 128
"""BLOCK_PIX of the branches that leave moments. Not tuned: it decides the size of a buffer, allocated before."""

# No wider: the moments of the columns take as many registers again as the accumulator.
BRANCHES = (
    config(8, 3, BLOCK_PIX=MOMENT_PIXELS, BLOCK_CO=64, BLOCK_C=32),
    config(4, 3, BLOCK_PIX=MOMENT_PIXELS, BLOCK_CO=32, BLOCK_C=16),
    config(4, 3, BLOCK_PIX=MOMENT_PIXELS, BLOCK_CO=16, BLOCK_C=16),
)

INPUT_GRAD = (
    config(8, 3, BLOCK_PIX=128, BLOCK_C=128, BLOCK_CO=32),
    config(4, 4, BLOCK_PIX=128, BLOCK_C=64, BLOCK_CO=32),
    config(4, 4, BLOCK_PIX=64, BLOCK_C=64, BLOCK_CO=32),
    config(4, 3, BLOCK_PIX=128, BLOCK_C=32, BLOCK_CO=32),
    config(4, 3, BLOCK_PIX=64, BLOCK_C=16, BLOCK_CO=16),
)

# Two accumulators and a tile of weights: eight warps for what four carry elsewhere.
WEIGHT_GRAD = (
    config(8, 3, BLOCK_PIX=64, BLOCK_CO=64),
    config(8, 3, BLOCK_PIX=32, BLOCK_CO=64),
    config(4, 3, BLOCK_PIX=32, BLOCK_CO=32),
    config(4, 3, BLOCK_PIX=32, BLOCK_CO=16),
)


def weight_grad_channels(channels_per_group: int) -> int:
    """BLOCK_C of the weight gradient. Not tuned: it decides the size of a buffer, which is allocated before."""
    return min(64, max(16, triton.next_power_of_2(channels_per_group)))


def weight_block(channels_per_group: int) -> int:
    """BLOCK_CO and BLOCK_C of the reductions over weights: small, for they are many and each waits for memory."""
    return min(32, max(16, triton.next_power_of_2(channels_per_group)))


STATISTICS_KEY = ("C", "KH", "KW", "STRIDE_H", "STRIDE_W")

STATISTICS = (
    config(4, 3, BLOCK_PIX=32, BLOCK_C=128),
    config(4, 3, BLOCK_PIX=64, BLOCK_C=64),
    config(4, 3, BLOCK_PIX=64, BLOCK_C=32),
    config(4, 3, BLOCK_PIX=64, BLOCK_C=16),
)

GATE_KEY = ("C", "CR", "CO", "G", "TAPS")

GATE = (
    config(8, 2, BLOCK_N=16, BLOCK_CO=16, BLOCK_C=64),
    config(4, 2, BLOCK_N=16, BLOCK_CO=32, BLOCK_C=32),
    config(4, 2, BLOCK_N=16, BLOCK_CO=16, BLOCK_C=16),
)

FUSION_KEY = ("C",)

FUSION = (
    config(4, 2, BLOCK_PIX=32, BLOCK_C=128),
    config(4, 2, BLOCK_PIX=64, BLOCK_C=64),
    config(4, 2, BLOCK_PIX=128, BLOCK_C=32),
    config(4, 2, BLOCK_PIX=64, BLOCK_C=16),
)

# Five accumulators.
NORM_SUMS = (
    config(4, 2, BLOCK_PIX=16, BLOCK_C=128),
    config(4, 2, BLOCK_PIX=32, BLOCK_C=64),
    config(4, 2, BLOCK_PIX=64, BLOCK_C=32),
    config(4, 2, BLOCK_PIX=64, BLOCK_C=16),
)
