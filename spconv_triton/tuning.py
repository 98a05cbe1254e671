"""Keep what the tuner chose, and ship it: no tuning at the first call on machines of the same kind.

Triton's own cache on disk already spares a second process on one machine the tuning. A file written here can travel: it
is plain JSON, and holds a choice per kernel, layer and dtype, not per input size.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton

from .launch import TUNED_KERNELS

FORMAT = 1


def save_tuning(path: str | os.PathLike[str]) -> int:
    """Write every choice that this process has made.

    Args:
        path: of the file, which is written whole or not at all.

    Returns:
        How many choices there are.

    Raises:
        OSError: it cannot be written.
    """
    entries = [
        {
            "kernel": name,
            "key": list(key),
            "blocks": config.kwargs,
            "warps": config.num_warps,
            "stages": config.num_stages,
        }
        for name, kernel in _tuners()
        for key, config in kernel.cache.items()
    ]
    path = Path(path)
    text = json.dumps(
        {"format": FORMAT, "device": _device(), "triton": triton.__version__, "choices": entries}, indent=1
    )
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return len(entries)


def load_tuning(path: str | os.PathLike[str]) -> int:
    """Take the choices of a file.

    Args:
        path: a file of :func:`save_tuning`.

    Returns:
        How many choices were taken. None are where the file is of another device or version of Triton; nor are those
        that the kernels' tables no longer hold. What was tuned in this process stays.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a file of :func:`save_tuning`.
    """
    try:
        saved = json.loads(Path(path).read_text())
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']}")
        if saved["device"] != _device() or saved["triton"] != triton.__version__:
            return 0
        return sum(_take(choice) for choice in saved["choices"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"path must be a file written by save_tuning (format {FORMAT}), got {path}: {error!r}"
        ) from None


def _take(choice: dict[str, Any]) -> bool:
    kernel = dict(_tuners()).get(choice["kernel"])
    key = tuple(choice["key"])
    if kernel is None or key in kernel.cache:
        return False
    for config in kernel.configs:
        if (config.kwargs, config.num_warps, config.num_stages) == (
            choice["blocks"],
            choice["warps"],
            choice["stages"],
        ):
            kernel.cache[key] = config
            return True
    return False


def _tuners() -> Iterable[tuple[str, Any]]:
    return ((kernel.base_fn.__name__, kernel) for kernel in TUNED_KERNELS)


def _device() -> str:
    """The kind of device that a choice holds for: backend, architecture and warp size; ``"none"`` without a GPU."""
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # there is no active driver
        return "none"
    return f"{target.backend} {target.arch} {target.warp_size}"
