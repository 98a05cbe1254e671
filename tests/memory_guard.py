"""Every load and store of every kernel, watched in Triton's interpreter: bounds, races, coverage, and bytes moved.

    with guarded() as report:
        y = functional.spconv2d(x, ..., backend="triton")
    report.launches[0].loaded_bytes["x_ptr"]

Own code, because triton-viz 3.0, whose sanitizer knows bounds but neither races nor coverage, does not import beside
Triton 3.8 (it wraps ``create_make_block_ptr``, which is gone); this needs Triton's interpreter, 3.6 to 3.9.

What is an error, a :class:`GuardError` at the access or at the end of the launch:

- **Bounds.** An address, unless masked off, that is not an element of the tensor behind the *same* argument: of the
  view that was passed, by its sizes and strides, not of its storage. A kernel that gets a slice of the channels may
  touch these channels only, and a pointer that strays into another argument's tensor is as wrong as any other. Loads
  and stores of descriptors clip at the descriptor's shape; what is left of them must be inside the tensor that the
  descriptor was made of.
- **Races.** Nothing orders the programs of a launch. So no element may be stored twice, by two programs or by one, and
  none loaded by one program and stored by another, whichever the interpreter happened to run first. Nor may a program
  load what it stored, since nothing orders its threads around global memory either; the reverse, in place, is legal.
  Arguments that share memory are one for this purpose.
- **Coverage.** A tensor that a launch stores to, be every lane masked off, is an output, and every element of its view
  must be stored. A buffer that is filled in part on purpose is named in ``partly_stored``; no kernel of the package
  has one.
- **Atomics** of any kind: the order of their sums is not that of the next run.

A tensor that is passed but not touched (kernels get some tensor for a missing bias) is no output and costs no bytes.

How: each argument gets addresses of its own, far from all others, in place of its tensor's. Offsets, comparisons and
selections of pointers compute on these, so that what arrives at a load or store tells its argument and offset. Only
once checked is it translated to the tensor's memory.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from spconv_triton.dispatch import INTERPRETED

SPACE_BITS = 44
"""Each argument has 2^44 bytes of addresses, and its tensor lies in their middle."""

FIRST_SPACE = 1 << 12
"""Above every address that the system hands out."""

NOBODY = -1

MEMORY = interpreter._interpreter
"""Triton's own loads and stores."""


class GuardError(AssertionError):
    """A kernel touched what it must not, or left out what it should have stored."""


@dataclass
class Launch:
    """One launch, and what it moved: bytes by argument name, 0 for arguments that were not touched.

    Lanes that are masked off count nothing, and a descriptor's box counts what of it lies inside the tensor.

    Attributes:
        kernel: name of the kernel.
        grid: programs along the three axes.
        scalars: the arguments that are not tensors, block sizes among them.
        loaded_bytes: by all loads of all programs, each as often as it was loaded.
        unique_loaded_bytes: of the distinct elements among them: what a perfect cache would fetch.
        stored_bytes: by all stores; of distinct elements, since none is stored twice.
    """

    kernel: str
    grid: tuple[int, int, int] = (0, 0, 0)
    scalars: dict[str, Any] = field(default_factory=dict)
    loaded_bytes: Counter[str] = field(default_factory=Counter)
    unique_loaded_bytes: Counter[str] = field(default_factory=Counter)
    stored_bytes: Counter[str] = field(default_factory=Counter)


@dataclass
class Report:
    """The launches of a ``with guarded()`` block that ended without a fault, in order."""

    launches: list[Launch] = field(default_factory=list)

    @property
    def kernels(self) -> set[str]:
        return {launch.kernel for launch in self.launches}

    def of(self, kernel: str) -> list[Launch]:
        """The launches of one kernel."""
        return [launch for launch in self.launches if launch.kernel == kernel]


@contextmanager
def guarded(*, partly_stored: Collection[str] = ()) -> Iterator[Report]:
    """Check every launch inside the block, and count its bytes.

    Args:
        partly_stored: outputs that a launch need not fill, as ``"kernel.argument"``.

    Raises:
        RuntimeError: kernels are not interpreted here, so that nothing would be checked.
        GuardError: from within a launch or at its end; see above.
    """
    if not INTERPRETED:
        raise RuntimeError("the guard watches Triton's interpreter: run with TRITON_INTERPRET=1")
    guard = _Guard(partly_stored)
    builder = interpreter.InterpreterBuilder
    with ExitStack() as patches:
        replace = [
            (interpreter.GridExecutor, "__call__", guard.launch(interpreter.GridExecutor.__call__)),
            (interpreter.GridExecutor, "_init_args_hst", guard.arguments(interpreter.GridExecutor._init_args_hst)),
            (interpreter, "_implicit_cvt", guard.pointer(interpreter._implicit_cvt)),
            (interpreter, "_interpreter", SimpleNamespace(load=guard.load, store=guard.store)),
            *((builder, name, guard.atomic) for name in dir(builder) if name.startswith("create_atomic")),
        ]
        for owner, name, replacement in replace:
            patches.enter_context(mock.patch.object(owner, name, replacement))
        yield guard.report


class _Storage:
    """Which programs loaded and stored each element of a storage in this launch."""

    def __init__(self, tensor: Tensor) -> None:
        self.itemsize = tensor.element_size()
        self.first_reader, self.last_reader, self.writer = np.full(
            (3, tensor.untyped_storage().nbytes() // self.itemsize), NOBODY, np.int32
        )


class _Argument:
    """A tensor of a launch: its elements, its addresses, and what of it was touched.

    The position of an element is its distance from the view's first one, in elements.
    """

    def __init__(self, name: str, tensor: Tensor, number: int, storage: _Storage) -> None:
        self.name = name
        self.tensor = tensor
        self.number = number
        self.storage = storage
        self.itemsize = tensor.element_size()
        # Alignment, which descriptors require, is the tensor's.
        self.pointer = (number << SPACE_BITS) + (1 << SPACE_BITS - 1) + tensor.data_ptr() % 4096
        self.to_memory = np.uint64((tensor.data_ptr() - self.pointer) % 2**64)
        positions = self.positions()
        self.held = np.zeros(positions.max(initial=-1) + 1, bool)
        self.held[positions] = True
        self.loaded = np.zeros_like(self.held)
        self.is_output = False

    def positions(self) -> np.ndarray:
        """Of every element, in the shape of the tensor."""
        positions = np.zeros((), np.int64)
        for size, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True):
            positions = np.add.outer(positions, np.arange(size) * stride)
        return positions

    def locate(self, pointers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Offsets in bytes, and which are elements'."""
        offsets = (pointers - np.uint64(self.pointer)).view(np.int64)
        positions, inside_element = np.divmod(offsets, self.itemsize)
        legal = (inside_element == 0) & (positions >= 0) & (positions < self.held.size)
        legal &= self.held.take(positions, mode="clip") if self.held.size else False
        return offsets, legal

    def element(self, position: int) -> str:
        """The element at ``position``, as indexed in Python."""
        return f"{self.name}{np.argwhere(self.positions() == position)[0].tolist()}"

    def __str__(self) -> str:
        return f"{self.name} (shape {list(self.tensor.shape)}, strides {list(self.tensor.stride())})"


class _Guard:
    """The state of a launch, and the functions that stand in for the interpreter's."""

    def __init__(self, partly_stored: Collection[str]) -> None:
        self.report = Report()
        self.partly_stored = partly_stored
        self.begin("")

    def begin(self, kernel: str) -> None:
        self.current = Launch(kernel)
        self.by_number: dict[int, _Argument] = {}
        self.by_identity: dict[int, _Argument] = {}
        self.storages: dict[int, _Storage] = {}

    def launch(self, original: Any) -> Any:
        def call(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.begin(executor.fn.__name__)
            try:
                original(executor, *args, **kwargs)
            except InterpreterError as error:
                cause = error.__cause__
                while isinstance(cause, InterpreterError):
                    cause = cause.__cause__
                if isinstance(cause, GuardError):
                    raise cause from None
                raise
            self.end()

        return call

    def arguments(self, original: Any) -> Any:
        def init(executor: Any, args: Any, kwargs: Any) -> Any:
            on_host = original(executor, args, kwargs)
            for name, value in inspect.getcallargs(executor.fn, *on_host[0], **on_host[1]).items():
                self.add_argument(name, value)
            return on_host

        return init

    def add_argument(self, name: str, value: Any) -> None:
        if isinstance(value, TensorDescriptor):
            self.add_argument(name, value.base)
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                self.add_argument(f"{name}[{i}]", item)
        elif isinstance(value, Tensor):
            storage = self.storages.setdefault(value.untyped_storage().data_ptr(), _Storage(value))
            if value.numel() and storage.itemsize != value.element_size():
                raise NotImplementedError(f"{self.current.kernel}: {name} shares memory with another dtype's tensor")
            argument = _Argument(name, value, FIRST_SPACE + len(self.by_number), storage)
            self.by_number[argument.number] = self.by_identity[id(value)] = argument
        else:
            self.current.scalars[name] = value

    def pointer(self, original: Any) -> Any:
        def convert(value: Any) -> Any:
            converted = original(value)
            if isinstance(value, Tensor):
                converted.handle.data = np.array([self.by_identity[id(value)].pointer], np.uint64)
            return converted

        return convert

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        addresses = np.zeros(pointers.size, np.uint64)
        for argument, lanes, positions in self.accesses("loads", pointers, mask, dtype):
            addresses[lanes] = pointers.reshape(-1)[lanes] + argument.to_memory
            self.note_loads(argument, positions)
        return MEMORY.load(addresses.reshape(pointers.shape), mask, other, dtype)

    def store(self, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        addresses = np.zeros(pointers.size, np.uint64)
        for number in np.unique(pointers >> np.uint64(SPACE_BITS)).tolist():
            if number in self.by_number:
                self.by_number[number].is_output = True
        for argument, lanes, positions in self.accesses("stores", pointers, mask, values.dtype):
            addresses[lanes] = pointers.reshape(-1)[lanes] + argument.to_memory
            self.note_stores(argument, positions)
        MEMORY.store(addresses.reshape(pointers.shape), values, mask)

    def atomic(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        self.fault("uses an atomic: sums in an order that changes from run to run")

    def accesses(
        self, verb: str, pointers: np.ndarray, mask: np.ndarray, dtype: np.dtype
    ) -> Iterator[tuple[_Argument, np.ndarray, np.ndarray]]:
        """The arguments that are accessed: by which lanes, at which positions; all inside."""
        active = np.flatnonzero(np.broadcast_to(mask, pointers.shape))
        taken = pointers.reshape(-1)[active]
        numbers = taken >> np.uint64(SPACE_BITS)
        for number in np.unique(numbers).tolist():
            argument = self.by_number.get(number)
            if argument is None:
                self.fault(f"{verb} at a pointer that is none of its arguments'")
            chosen = numbers == number
            offsets, legal = argument.locate(taken[chosen])
            if not legal.all():
                first = offsets[~legal][0]
                self.fault(
                    f"{verb} {argument} at element {first / argument.itemsize:g} (byte {first}) from its first, which "
                    f"is outside; so are {np.count_nonzero(~legal)} of {legal.size} lanes"
                )
            if dtype.itemsize != argument.itemsize:
                self.fault(f"{verb} {dtype.itemsize} bytes at elements of {argument}, which have {argument.itemsize}")
            yield argument, active[chosen], offsets // argument.itemsize

    def note_loads(self, argument: _Argument, positions: np.ndarray) -> None:
        places, storage = argument.tensor.storage_offset() + positions, argument.storage
        writers = storage.writer[places]
        if (writers != NOBODY).any():
            self.race("loads", argument, positions, writers, "stored")
        first = storage.first_reader[places]
        storage.first_reader[places] = np.where(first == NOBODY, self.program, first)
        storage.last_reader[places] = self.program
        argument.loaded[positions] = True
        self.current.loaded_bytes[argument.name] += positions.size * argument.itemsize

    def note_stores(self, argument: _Argument, positions: np.ndarray) -> None:
        places, storage = argument.tensor.storage_offset() + positions, argument.storage
        _, once = np.unique(places, return_index=True)
        lanes_before = np.full(places.size, self.program)
        lanes_before[once] = NOBODY
        writers = storage.writer[places]
        readers = np.where(
            storage.first_reader[places] == self.program, storage.last_reader[places], storage.first_reader[places]
        )
        readers[readers == self.program] = NOBODY  # in place
        for others, what in ((writers, "stored"), (lanes_before, "stored"), (readers, "loaded")):
            if (others != NOBODY).any():
                self.race("stores", argument, positions, others, what)
        storage.writer[places] = self.program
        self.current.stored_bytes[argument.name] += positions.size * argument.itemsize

    def end(self) -> None:
        launch = self.current
        launch.grid = interpreter.interpreter_builder.grid_dim
        for argument in self.by_number.values():
            if argument.loaded.any():
                launch.unique_loaded_bytes[argument.name] = int(argument.loaded.sum()) * argument.itemsize
            if not argument.is_output or f"{launch.kernel}.{argument.name}" in self.partly_stored:
                continue
            positions = np.flatnonzero(argument.held)
            writers = argument.storage.writer[argument.tensor.storage_offset() + positions]
            missing = positions[writers == NOBODY]
            if missing.size:
                raise GuardError(
                    f"{launch.kernel} never stores {missing.size} of {positions.size} elements of {argument}, "
                    f"first {argument.element(missing[0])}"
                )
        self.report.launches.append(launch)

    @property
    def program(self) -> int:
        """The running program's number in the order in which the interpreter runs them."""
        builder = interpreter.interpreter_builder
        return int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))

    def race(self, verb: str, argument: _Argument, positions: np.ndarray, others: np.ndarray, what: str) -> NoReturn:
        lane = np.flatnonzero(others != NOBODY)[0]
        other = tuple(map(int, np.unravel_index(others[lane], interpreter.interpreter_builder.grid_dim)))
        self.fault(f"{verb} {argument.element(positions[lane])}, which program {other} has {what} in the same launch")

    def fault(self, message: str) -> NoReturn:
        raise GuardError(f"{self.current.kernel}: program {interpreter.interpreter_builder.grid_idx} {message}")
