"""What the compiler made of each kernel of the matrix: taken in several processes, kept in a file."""

from __future__ import annotations

import collections
import json
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import triton

from benchmarks import matrix
from benchmarks.files import write
from benchmarks.machine_code import LOCAL, VECTOR_PRODUCTS, count, is_product, opcode
from benchmarks.matrix import Compilation
from benchmarks.processors import issue_cycles, programs, tensor_cycles

FORMAT = 1

POINTER_LOADS = ("LDG", "LDGSTS", "global_load", "buffer_load")
"""How loads that are not a descriptor's begin."""


class Row(NamedTuple):
    """One compiled kernel. Nothing here was run.

    Attributes:
        kernel, target, precision, layer, flags, tile: what it is called.
        fingerprint: of what decides its machine code.
        warps: of a program.
        registers, spilled_bytes: of a thread.
        shared_bytes, tensor_memory: of a program.
        instructions: all of them.
        products: those of the tensor cores.
        tma_loads, tma_stores: of whole boxes, by descriptor.
        local: loads and stores of spilled registers.
        loop, loop_tma_loads, loop_pointer_loads: the same of a step of the hot loop; 0 where there is none.
        looped_local: loads and stores of spilled registers in any innermost loop that multiplies.
        loop_products: mnemonics of the step's products and how many there are, of the tensor cores or, where a kernel
            has none of those, of float32.
        overwritten: instructions that write registers which a product in flight reads.
        error: of the compiler, in its words; the numbers are then 0.
    """

    kernel: str
    target: str
    precision: str
    layer: str
    flags: str
    tile: str
    fingerprint: str
    warps: int
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    tensor_memory: int = 0
    instructions: int = 0
    products: int = 0
    tma_loads: int = 0
    tma_stores: int = 0
    local: int = 0
    loop: int = 0
    loop_tma_loads: int = 0
    loop_pointer_loads: int = 0
    looped_local: int = 0
    loop_products: str = ""
    overwritten: int = 0
    error: str = ""

    @property
    def identity(self) -> tuple[str, ...]:
        """What it is called: stays the same when the kernel changes."""
        return self[:6]

    def __str__(self) -> str:
        return ", ".join(filter(None, self.identity))

    @property
    def tensor_products(self) -> dict[str, int]:
        """Mnemonics of the tensor cores' products in the loop, and how many there are."""
        counted = (part.rpartition(" x") for part in self.loop_products.split(", ") if part)
        return {mnemonic: int(number) for mnemonic, _, number in counted if is_product(mnemonic)}

    @property
    def programs(self) -> int:
        """How many share a processor."""
        return programs(self.target, self.registers, self.shared_bytes, self.warps, self.tensor_memory)

    @property
    def issue_cycles(self) -> float | None:
        """Of a step of the hot loop."""
        return issue_cycles(self.target, self.loop, self.warps) if self.loop else None

    @property
    def tensor_cycles(self) -> float | None:
        """Of a step of the hot loop, where the instructions tell."""
        return tensor_cycles(self.target, self.tensor_products, self.warps)


def measure(one: Compilation) -> Row:
    """Compile it anew, and count. An error of the compiler is a result."""
    row = Row(*one.identity, one.fingerprint, one.warps)
    try:
        code = one.compile(fresh=True)
    except Exception as error:  # whatever a compiler raises
        return row._replace(error=f"{type(error).__name__}: {error}".partition("\n")[0][:300])
    multiplied = collections.Counter(i for i in code.loop if is_product(i))
    if not multiplied:
        multiplied = collections.Counter(opcode(i) for i in code.loop if i.startswith(VECTOR_PRODUCTS))
    return row._replace(
        registers=code.registers,
        spilled_bytes=code.spilled_bytes,
        shared_bytes=code.shared_bytes,
        tensor_memory=code.tensor_memory,
        instructions=len(code.instructions),
        products=sum(map(is_product, code.instructions)),
        tma_loads=code.count("UTMALDG"),
        tma_stores=code.count("UTMASTG"),
        local=sum(i.startswith(LOCAL) for i in code.instructions),
        loop=len(code.loop),
        loop_tma_loads=count(code.loop, "UTMALDG"),
        loop_pointer_loads=sum(i.startswith(POINTER_LOADS) for i in code.loop),
        looped_local=sum(i.startswith(LOCAL) for i in code.looped),
        loop_products=", ".join(f"{mnemonic} x{number}" for mnemonic, number in sorted(multiplied.items())),
        overwritten=code.overwritten,
    )


def measure_all(wanted: Sequence[Compilation], jobs: int) -> Iterator[Row]:
    """:func:`measure` each, in ``jobs`` processes, in whatever order they are done.

    Raises:
        BrokenProcessPool: a compiler died. What was yielded before stands.
    """
    context, targets = multiprocessing.get_context("spawn"), tuple({one.target for one in wanted})
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare, initargs=targets) as pool:
        for future in as_completed([pool.submit(_measure, one.fingerprint) for one in wanted]):
            yield future.result()


_matrix: dict[str, Compilation] = {}


def _prepare(*targets: str) -> None:
    _matrix.update((one.fingerprint, one) for one in matrix.compilations(targets))


def _measure(fingerprint: str) -> Row:
    return measure(_matrix[fingerprint])


def load(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a file of :func:`save`.
    """
    try:
        saved = json.loads(path.read_text())
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']}")
        return [Row(**dict(zip(saved["columns"], values, strict=True))) for values in saved["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a static report of format {FORMAT}: {error!r}") from None


def save(path: Path, rows: Iterable[Row]) -> None:
    """Write the file, whole or not at all: JSON with a line for each row, in the order of their names."""
    lines = ",\n".join(json.dumps(row) for row in sorted(rows))
    head = {
        "format": FORMAT,
        "about": "Compiled for GPUs, and run on none: counts of machine code, by python -m benchmarks.static",
        "triton": triton.__version__,
        "columns": Row._fields,
    }
    text = f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n'
    write(path, text)
