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
FULL = "all registers are taken, and a few addresses and masks wait outside the loops"
VECTOR = "float32 without tensor cores: operands pass through registers, and smaller blocks load more for each product"
SCALAR = "scalar registers are kept in lanes of vector registers: no memory is touched"

CUDA = ("sm_80", "sm_90", "sm_100", "sm_120")
HALVES = ("float16", "bfloat16")
TENSOR = (*HALVES, "tf32")
ANY = (*TENSOR, "float32")

EXEMPT = (
    Exempt("branch_forward", CUDA, TENSOR, 8, 4, 0, STEP),
    Exempt("branches_forward", CUDA, TENSOR, 8, 4, 0, STEP),
    Exempt("branches_forward", CUDA, ("float32",), 80, 40, 0, VECTOR),
    Exempt("fusion_blend_grad", CUDA, ("float32",), 8, 2, 0, STEP),
    Exempt("gate_planes", CUDA, ANY, 24, 12, 0, STEP),
    Exempt("input_grad", CUDA, ("float32",), 112, 95, 25, VECTOR),
    Exempt("input_grad", CUDA, TENSOR, 40, 18, 2, FULL),
    Exempt("input_grad", ("gfx942",), TENSOR, 70, 0, 0, SCALAR),
    Exempt("input_grad_descriptor", ("sm_100",), HALVES, 8, 3, 0, STEP),
    Exempt("norm_sums", ("sm_100",), HALVES, 8, 2, 1, STEP),
    Exempt("onepass_forward", CUDA, ("float32",), 96, 54, 10, VECTOR),
    Exempt("onepass_forward", CUDA, ("tf32",), 16, 6, 0, FULL),
    Exempt("onepass_forward", ("gfx942",), TENSOR, 2, 0, 0, SCALAR),
    Exempt("weight_grad", CUDA, HALVES, 24, 13, 8, STEP),
    Exempt("weight_grad", CUDA, ("tf32",), 48, 27, 0, STEP),
    Exempt("weight_grad", CUDA, ("float32",), 24, 12, 0, VECTOR),
    Exempt("weight_grad", ("gfx942",), TENSOR, 21, 0, 0, SCALAR),
    Exempt("window_statistics", CUDA, ("float32",), 8, 2, 0, STEP),
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
    """Exceptions that no row needs."""
    spilling = [row for row in rows if row.spilled_bytes or row.local]
    return [one for one in exempt if not any(map(one.covers, spilling))]
