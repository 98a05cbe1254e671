"""Keep what the tuner chose, and ship it: no tuning at the first call on machines of the same kind.

Triton's own cache on disk already spares a second process on one machine the tuning. A file written here can travel: it
is plain JSON, and holds a choice per kernel, layer and dtype, not per input size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import launch
from .files import write_whole

FORMAT = 1


def save_tuning(path: str | os.PathLike[str]) -> int:
    """Write every choice that this process has made.

    Args:
        path: of the file, which is written whole or not at all.

    Returns:
        How many choices there are.

    Raises:
        ImportError: triton does not import.
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
    text = json.dumps({"format": FORMAT, **_machine(), "choices": entries}, indent=1)
    write_whole(Path(path), text.encode())
    return len(entries)


def load_tuning(path: str | os.PathLike[str]) -> int:
    """Take the choices of a file.

    Args:
        path: a file of :func:`save_tuning`.

    Returns:
        How many choices were taken: 0 of a file that was written for another kind of device or version of Triton.
        Choices that a kernel's table no longer holds, or that this process has tuned itself, are skipped.

    Raises:
        ImportError: triton does not import.
        OSError: the file cannot be read.
        ValueError: it is not a file of :func:`save_tuning`; then none is taken.
    """
    machine = _machine()
    try:
        saved = json.loads(Path(path).read_text())
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']}")
        if any(saved[name] != value for name, value in machine.items()):
            return 0
        found = [_find(choice) for choice in saved["choices"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"path must be a file written by save_tuning (format {FORMAT}), got {path}: {error!r}"
        ) from None
    taken = [(kernel, key, config) for kernel, key, config in filter(None, found) if key not in kernel.cache]
    for kernel, key, config in taken:
        kernel.cache[key] = config
    return len(taken)


def _find(choice: dict[str, Any]) -> tuple[Any, tuple[Any, ...], Any] | None:
    """The tuner, the key and the configuration of a choice; None where the kernel or its configuration is gone."""
    kernel, key = dict(_tuners()).get(choice["kernel"]), tuple(choice["key"])
    hash(key)  # a TypeError here, not when half of the file is taken
    wanted = choice["blocks"], choice["warps"], choice["stages"]
    for config in () if kernel is None else kernel.configs:
        if (config.kwargs, config.num_warps, config.num_stages) == wanted:
            return kernel, key, config
    return None


def _tuners() -> Iterable[tuple[str, Any]]:
    return ((kernel.base_fn.__name__, kernel) for kernel in launch.TUNED_KERNELS)


def _machine() -> dict[str, str]:
    """What a choice holds for: the kind of device (backend, architecture and warp size; ``"none"`` without a GPU) and
    Triton's version."""
    import triton

    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # there is no active driver
        device = "none"
    else:
        device = f"{target.backend} {target.arch} {target.warp_size}"
    return {"device": device, "triton": triton.__version__}
