"""What a launch moves and multiplies, and how it is added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Access(NamedTuple):
    """Bytes of one tensor: each once, and as often as all programs ask for them."""

    touched: int
    requested: int


@dataclass(frozen=True)
class Traffic:
    """Of one launch.

    Attributes:
        loads, stores: by argument; those that the launch neither loads nor stores are not there.
        flops: two for a multiply-add of a tile, by precision: ``"half"``, ``"tf32"``, ``"ieee"`` (float32 outside
            the tensor cores), or of two or three products for one ``"halfx2"``, ``"tf32x2"``, ``"tf32x3"``.
    """

    loads: Mapping[str, Access]
    stores: Mapping[str, Access]
    flops: Mapping[str, int]

    @property
    def touched(self) -> int:
        return sum(access.touched for access in (*self.loads.values(), *self.stores.values()))

    @property
    def requested(self) -> int:
        return sum(access.requested for access in (*self.loads.values(), *self.stores.values()))


class Tally:
    """Collects a launch's counts; in elements, which the tensors know the size of."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.loads: dict[str, Access] = {}
        self.stores: dict[str, Access] = {}
        self.flops: Counter[str] = Counter()

    def load(self, name: str, requested: int, touched: int | None = None) -> None:
        """``touched`` is the whole tensor unless given; 0 requested says that this launch has no use for it."""
        self._note(self.loads, name, requested, touched)

    def store(self, name: str, requested: int | None = None) -> None:
        """No element is stored twice, and all of them are unless ``requested`` says how many."""
        requested = tensor_of(self.values[name]).numel() if requested is None else requested
        self._note(self.stores, name, requested, requested)

    def multiply(self, precision: str, dots: int, *sides: int) -> None:
        """``dots`` products of tiles; ``sides`` are rows, columns and depth."""
        self.flops[precision] += 2 * dots * prod(sides)

    def _note(self, where: dict[str, Access], name: str, requested: int, touched: int | None) -> None:
        tensor = tensor_of(self.values[name])
        touched = tensor.numel() if touched is None else touched
        where[name] = Access(*(int(n) * tensor.element_size() if requested else 0 for n in (touched, requested)))


def tensor_of(value: Any) -> Tensor:
    """The tensor, or that which a descriptor was made of."""
    return value.base if isinstance(value, TensorDescriptor) else value
