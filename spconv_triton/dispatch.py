"""Which implementation runs: the one place that decides."""

from __future__ import annotations

import importlib
import os

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "native", "reference")


def _import_triton() -> str | None:
    """Why triton cannot be imported, None if it can: it may be missing, or installed and broken."""
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError:
        return "triton is not installed"
    except ImportError as error:
        return f"triton does not import: {error}"
    return None


WITHOUT_TRITON = _import_triton()
HAS_TRITON = WITHOUT_TRITON is None

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in (
    "1",
    "true",
    "yes",
    "on",
    "y",
)
"""Triton runs its kernels in NumPy, on tensors in host memory. Read once: kernels are built for one or the other."""

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose(x: Tensor, backend: str = "auto") -> str:
    """The backend that serves ``x``: ``"triton"``, ``"native"`` or ``"reference"``.

    ``auto`` takes the Triton kernels wherever they run at full speed: a GPU (CUDA or HIP), triton installed, and a
    dtype that they have; otherwise ATen. The interpreter is for tests, so ``auto`` never takes it.

    Raises:
        ValueError: an unknown backend, or ``"triton"`` where it cannot run, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "auto":
        return "triton" if x.is_cuda and _why_not_triton(x) is None else "native"
    if backend == "triton":
        reason = _why_not_triton(x)
        if reason is not None:
            raise ValueError(f"backend='triton' cannot run here: {reason}; legal: 'auto', 'native', 'reference'")
    return backend


def _why_not_triton(x: Tensor) -> str | None:
    if WITHOUT_TRITON is not None:
        return WITHOUT_TRITON
    if x.dtype not in TRITON_DTYPES:
        return f"its kernels take float32, bfloat16 and float16, and x is {x.dtype}"
    if not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
        return f"x is on {x.device}, not on a GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, for tests)"
    return None
