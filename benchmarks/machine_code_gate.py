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
FULL = "all 255 registers are taken, and a few addresses and masks wait outside the loops"
VECTOR = "float32 without tensor cores: operands pass through registers, and smaller blocks load more for each product"
SCALAR = "scalar registers are kept in lanes of vector registers: no memory is touched"

HALVES = ("float16", "bfloat16")
CUDA = ("sm_80", "sm_90", "sm_100", "sm_120")

EXEMPT = (
    Exempt("branch_forward", ("sm_80",), HALVES, 8, 2, 0, STEP),
    Exempt("branch_forward", ("sm_120",), ("tf32",), 8, 4, 0, STEP),
    Exempt("fusion_blend_grad", ("sm_80", "sm_90"), ("float32",), 8, 2, 0, STEP),
    Exempt("gate_planes", ("sm_90",), HALVES, 16, 8, 0, STEP),
    Exempt("gate_planes", ("sm_80",), ("tf32",), 8, 4, 0, STEP),
    Exempt("input_grad", CUDA, ("float32",), 104, 76, 25, VECTOR),
    Exempt("input_grad", ("sm_100",), ("float16",), 40, 18, 0, FULL),
    Exempt("input_grad", ("sm_80",), ("tf32",), 8, 4, 0, FULL),
    Exempt("input_grad", ("sm_100", "sm_120"), ("tf32",), 16, 7, 2, STEP),
    Exempt("input_grad", ("gfx942",), ("bfloat16", "tf32"), 70, 0, 0, SCALAR),
    Exempt("input_grad_descriptor", ("sm_100",), HALVES, 8, 3, 0, STEP),
    Exempt("onepass_forward", CUDA, ("float32",), 96, 54, 10, VECTOR),
    Exempt("onepass_forward", ("sm_80",), ("tf32",), 16, 6, 0, FULL),
    Exempt("onepass_forward", ("gfx942",), ("bfloat16",), 2, 0, 0, SCALAR),
    Exempt("weight_grad", CUDA, ("float32",), 24, 12, 0, VECTOR),
    Exempt("weight_grad", ("sm_90", "sm_100", "sm_120"), HALVES, 24, 12, 8, STEP),
    Exempt("weight_grad", ("sm_80", "sm_100"), ("tf32",), 48, 27, 0, STEP),
    Exempt("weight_grad", ("gfx942",), ("bfloat16",), 21, 0, 0, SCALAR),
    Exempt("window_statistics", ("sm_100", "sm_120"), ("float32",), 8, 2, 0, STEP),
)


def complaints(rows: Iterable[Row], exempt: Sequence[Exempt] = EXEMPT) -> list[str]:
    """What is wrong with these rows: compile errors, spills, local memory, more shared memory than there is."""
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
        limit = PROCESSORS[row.target].program_shared_bytes
        if row.shared_bytes > limit:
            found.append(f"{row}: takes {row.shared_bytes} of {limit} bytes of shared memory")
        elif row.programs == 0:
            found.append(f"{row}: no processor holds a program of it")
    return found


def unused(rows: Sequence[Row], exempt: Sequence[Exempt] = EXEMPT) -> list[Exempt]:
    """Exceptions that no row needs, or that allow more than any row takes."""
    found = []
    for one in exempt:
        covered = [row for row in rows if (row.spilled_bytes or row.local) and one.covers(row)]
        taken = [
            max(column) for column in zip(*((r.spilled_bytes, r.local, r.looped_local) for r in covered), strict=True)
        ]
        if taken != [one.spilled_bytes, one.local, one.looped_local]:
            found.append(one)
    return found
