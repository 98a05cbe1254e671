"""What ``torch.autocast`` does to a layer: what it does to ``torch.nn.functional.conv2d``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the result for an input ``x``: that of an enclosing ``torch.autocast``, else its own."""
    return autocast_dtype(x) or x.dtype


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that an enclosing ``torch.autocast`` computes a convolution of ``x`` in; None where it leaves it."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """All arguments in the dtype of an enclosing ``torch.autocast``, as for ``torch.nn.functional.conv2d``.

    float64 stays, and what is not a floating-point tensor is left for the checks to name.
    """
    dtype = autocast_dtype(x)
    if dtype is None:
        return (x, *others)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in (x, *others))


def cast_halves(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """``others``, which may be float32 beside an ``x`` in half precision; else cast as of :func:`cast`."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return others
    halves = (torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in halves else t for t in others)


def promote(x: Any, other: Any) -> tuple[Any, Any]:
    """Both in the wider of their dtypes under ``torch.autocast``, as for ``torch.addcmul``; unchanged without.

    Autocast leaves the results of one norm in float32 and of another in half precision.
    """
    both = all(isinstance(t, Tensor) and t.is_floating_point() for t in (x, other))
    if not both or x.dtype == other.dtype or autocast_dtype(x) is None:
        return x, other
    wider = torch.promote_types(x.dtype, other.dtype)
    return x.to(wider), other.to(wider)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """For a backward, whose dtypes are those of its forward, though it be called under ``torch.autocast``."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
