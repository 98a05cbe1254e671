"""Configurations by chance instead of the tuner's: checks try more of them so, and wait for none to be timed.

A plug-in of pytest, too: ``-p benchmarks.gpu.untuned``.
"""

from __future__ import annotations

import os
import random
from typing import Any

from triton.runtime import Autotuner

SEED = "SPCONV_GPU_SEED"

_chance = random.Random(int(os.environ.get(SEED, "0")))


def _by_chance(tuner: Autotuner, *args: Any, config: Any, **meta: Any) -> list[float]:  # noqa: ARG001
    """What the tuner takes for the times of a configuration."""
    return [_chance.random()] * 3


def take() -> None:
    """From now on, in this process."""
    Autotuner._bench = _by_chance


if os.environ.get("PYTEST_VERSION"):
    take()
