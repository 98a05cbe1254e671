"""What no compiled kernel may do, and the exceptions, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.measurements import Row
from benchmarks.processors import PROCESSORS


class Exempt(NamedTuple):
    """Rows that may spill.

    Attributes:
        kernel, targets, precisions: theirs.
        spilled_bytes, local, looped_local: at most so many bytes a thread, and so many loads and stores of them, in all
            and in loops that multiply.
        reason: why that is no matter.
    """

    kernel: str
    targets: tuple[str, ...]
    precisions: tuple[str, ...]
    spilled_bytes: int
    local: int
    looped_local: int
    reason: str

    def covers(self, row: Row) -> bool:
        return (
            row.kernel == self.kernel
            and row.target in self.targets
            and row.precision in self.precisions
            and row.spilled_bytes <= self.spilled_bytes
            and row.local <= self.local
            and row.looped_local <= self.looped_local
        )


STEP = "ptxas stops at a number of registers that fits one more program, and keeps a few words aside"
SCALAR = "scalar registers are kept in lanes of vector registers: no memory is touched"

HALVES = ("float16", "bfloat16")
TENSOR = (*HALVES, "tf32")

SPILLS_NOTHING = ("sm_80", "sm_90", "sm_100")
"""Targets without exceptions. What of a table spilled there is no longer in it, or pruned (``kernels/tuning.py``)."""

EXEMPT = (
    Exempt("branch_forward", ("sm_120",), ("tf32",), 8, 4, 0, STEP),
    Exempt("branches_forward", ("sm_120",), ("float32",), 16, 8, 0, STEP),
    Exempt("gate_planes", ("gfx942",), HALVES, 14, 0, 0, SCALAR),
    Exempt("input_grad", ("sm_120",), ("tf32", "float32"), 16, 8, 2, STEP),
    Exempt("input_grad", ("gfx942",), TENSOR, 46, 0, 0, SCALAR),
    Exempt("onepass_forward", ("gfx942",), TENSOR, 2, 0, 0, SCALAR),
    Exempt("weight_grad", ("gfx942",), TENSOR, 7, 0, 0, SCALAR),
)


def complaints(rows: Iterable[Row], exempt: Sequence[Exempt] = EXEMPT) -> list[str]:
    """What is wrong with these rows: compile errors, spills, local memory, operands that are overwritten, more shared
    memory than there is."""
    found = []
    for row in rows:
        if row.error:
            found.append(f"{row}: does not compile: {row.error}")
            continue
        if (row.spilled_bytes or row.local) and not any(one.covers(row) for one in exempt):
            found.append(
                f"{row}: spills {row.spilled_bytes} bytes a thread at {row.registers} registers, {row.local} loads and "
                f"stores of local memory, {row.looped_local} of them in loops that multiply"
            )
        if row.overwritten:
            found.append(f"{row}: {row.overwritten} instructions write registers that a product in flight reads")
        limit = PROCESSORS[row.target].program_shared_bytes
        if row.shared_bytes > limit:
            found.append(f"{row}: takes {row.shared_bytes} of {limit} bytes of shared memory")
        elif row.programs == 0:
            found.append(f"{row}: no processor holds a program of it")
    return found


def unused(rows: Sequence[Row], exempt: Sequence[Exempt] = EXEMPT) -> list[Exempt]:
    """Exceptions that no row needs."""
    spilling = [row for row in rows if row.spilled_bytes or row.local]
    return [one for one in exempt if not any(map(one.covers, spilling))]
