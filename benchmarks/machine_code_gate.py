"""What no compiled kernel may do, and the exceptions, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.measurements import Row
from benchmarks.processors import PROCESSORS


class Exempt(NamedTuple):
    """Rows that may spill.

    Attributes:
        kernel: their kernel.
        targets, precisions: theirs; any if empty.
        spilled_bytes: at most so many, and none of them touched in a loop that multiplies.
        reason: why that is no matter.
    """

    kernel: str
    targets: tuple[str, ...]
    precisions: tuple[str, ...]
    spilled_bytes: int
    reason: str

    def covers(self, row: Row) -> bool:
        return (
            row.kernel == self.kernel
            and (not self.targets or row.target in self.targets)
            and (not self.precisions or row.precision in self.precisions)
            and row.spilled_bytes <= self.spilled_bytes
            and row.looped_local == 0
        )


EXEMPT: tuple[Exempt, ...] = ()


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
    spilling = [row for row in rows if row.spilled_bytes or row.local]
    return [
        one
        for one in exempt
        if max((row.spilled_bytes for row in spilling if one.covers(row)), default=-1) != one.spilled_bytes
    ]
