"""Launching a kernel, and launching it again without what Triton does before.

Triton binds arguments, finds the tuner's choice and the compiled kernel, and checks them in every launch: a third and
more of what Python takes of an eager layer (``python -m benchmarks.host``). All of it depends on little: a launch like
an earlier one goes straight to the kernel that was compiled for that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.triton import is_wrap_triton_enabled
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dispatch import INTERPRETED
from .common import Grid

REMEMBERED = 4096
"""How many kinds of launches are, before all are forgotten."""


class Compiled(NamedTuple):
    """What a kind of launch led to.

    Attributes:
        tuned: the kernel with its tuner; held, for its address is part of what is looked up.
        kernel: Triton's compiled one.
        values: of the parameters behind those that a launch gives by position.
        meta: the constants by name, the tuner's among them.
    """

    tuned: Any
    kernel: Any
    values: tuple[Any, ...]
    meta: dict[str, Any]


_compiled: dict[Any, Compiled] = {}


def launch(kernel: Any, grid: Grid | tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, which a graph that is being traced sees.

    Args:
        kernel: a ``triton.jit`` function, with a tuner or without.
        grid: programs, or how many there are by the constants and the tuner's choice.
        args: tensors, descriptors of tensors, and ints.
        constants: of the ``tl.constexpr`` parameters; they come behind the others. ``OVERLAP`` is also how it is
            launched, see :mod:`..kernels.overlap`.
    """
    if not INTERPRETED and is_wrap_triton_enabled():
        torch.library.wrap_triton(kernel)[grid](*args, **traced(constants))
    else:
        launch_untraced(kernel, grid, *args, **constants)


def traced(constants: dict[str, Any]) -> dict[str, Any]:
    """The constants of a launch that a graph sees: a graph takes a kernel that waits to write whatever it is given."""
    return {**constants, "OVERLAP": False} if "OVERLAP" in constants else constants


def launch_untraced(kernel: Any, grid: Grid | tuple[int, ...], *args: Any, **constants: Any) -> None:
    """As :func:`launch`, where nothing is traced. Constants may be Triton's options, as ``num_warps``."""
    kind = None if INTERPRETED else _kind(kernel, args, constants)
    found = None if kind is None else _compiled.get(kind)
    if found is not None:
        programs = grid(found.meta) if callable(grid) else grid
        found.kernel[(*programs, 1, 1)[:3]](*args, *found.values)
        return
    options = {"launch_pdl": True} if constants.get("OVERLAP") else {}
    compiled = kernel[grid](*args, **constants, **options)
    if kind is not None:
        if len(_compiled) >= REMEMBERED:
            _compiled.clear()
        _compiled[kind] = _remember(kernel, compiled, len(args))


def _kind(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """What the compiled kernel and its constants depend on; None off NVIDIA's GPUs, where it is more than this.

    Triton compiles for dtypes, for pointers that are multiples of 16 bytes, and for ints that are 1 or multiples of 16;
    the tuner chooses by some of the constants and by dtypes. Ints count as they are: that is faster than to class them.
    """
    first = args[0]
    device = (first if isinstance(first, Tensor) else first.base).device
    if not _is_nvidia(device):
        return None
    kind = [id(kernel), device, *constants.items()]
    for arg in args:
        if isinstance(arg, Tensor):
            kind += (arg.dtype, arg.data_ptr() % 16 == 0)
        elif isinstance(arg, TensorDescriptor):
            kind += (arg.base.dtype, *arg.block_shape)
        else:
            kind.append(arg)
    return tuple(kind)


def _is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _remember(tuned: Any, compiled: Any, positional: int) -> Compiled:
    """From the compiled kernel, not from the tuner: another thread may have tuned since."""
    source = compiled.src
    names = source.fn.arg_names
    values = tuple(source.constants[index,] for index in range(positional, len(names)))
    return Compiled(tuned, compiled, values, dict(zip(names[positional:], values, strict=True)))
