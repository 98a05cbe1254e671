"""What a launch loads, stores and multiplies, worked out from its arguments, constants, configuration and grid.

``tests/kernels/test_traffic.py`` runs the kernels in Triton's interpreter, counts every load, store and product there,
and demands that :mod:`benchmarks.formulas` says the same. Two counts of each tensor:

- touched: every byte once, which is what memory has to deliver or take, however good the caches are;
- requested: what all programs ask for together, which is what passes between the L2 cache and the processors, unless
  their L1 caches help.

Products are those that are executed: of whole tiles, with the zeros beside a tensor and between merged groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from types import SimpleNamespace
from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.formulas import FORMULAS
from benchmarks.launches import Launch
from benchmarks.tally import Access, Tally, Traffic


def of_launch(launch: Launch, config: triton.Config) -> Traffic:
    """The traffic of ``launch`` if it runs with ``config``."""
    values = {**launch.arguments, **launch.constants, **config.kwargs}
    return of_values(launch.name, values, launch.grid(config))


def of_values(kernel: str, values: Mapping[str, Any], grid: Sequence[int]) -> Traffic:
    """The same, of a kernel by its name.

    Args:
        values: every argument and constant, blocks included, by name.
        grid: as it is launched.

    Raises:
        ValueError: a kernel that nothing is known of, or one that has changed: its grid is not what the formula
            expects, or it has tensors that the formula does not know.
    """
    if kernel not in FORMULAS:
        raise ValueError(f"no formula counts what {kernel!r} loads; known: {', '.join(FORMULAS)}")
    tally = Tally(values)
    expected = FORMULAS[kernel](SimpleNamespace(**values), tally)
    if prod(grid) != expected:
        raise ValueError(f"{kernel} is launched with {prod(grid)} programs, and its formula expects {expected}")
    tensors = {name for name, value in values.items() if isinstance(value, (Tensor, TensorDescriptor))}
    if unknown := tensors - tally.loads.keys() - tally.stores.keys():
        raise ValueError(f"{kernel} has tensors that its formula does not know: {', '.join(sorted(unknown))}")

    def used(accesses: Mapping[str, Access]) -> dict[str, Access]:
        return {name: access for name, access in accesses.items() if access.requested}

    return Traffic(used(tally.loads), used(tally.stores), dict(tally.flops))
