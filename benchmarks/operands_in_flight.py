"""Registers that a warp group's products may still be reading when they are written, in machine code of sm_90.

``HGMMA`` takes its first operand from shared memory or from registers, and goes on while the program does. Registers
are its own until ``WARPGROUP.DEPBAR.LE gsb0, n`` has waited for all but the last n groups of products; nothing in the
hardware, nor in ptxas, keeps an earlier instruction from writing them. Where Triton computes an operand in a loop, the
loop's next step may do so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

PER_OPERAND = 4
"""Registers of an operand in registers: 64 rows x 32 bytes, among 128 threads."""

LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]+?)\s*;")
BACK = re.compile(r"BRA\b.*`\((\.L_x_\d+)\)")
PRODUCT = re.compile(r"HGMMA\S*\s+R\d+,\s*R(\d+)")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE\s+gsb0,\s*(0x[0-9a-f]+)")
WRITE = re.compile(r"([A-Z]\S*)\s+R(\d+)\b")

READERS = ("ST", "RED", "ATOM", "SYNCS", "UTMA", "R2UR", "R2P", "ISETP", "FSETP", "BAR", "WARP", "BRA", "HGMMA")
"""How instructions begin whose first register is read, or that are products themselves."""


def overwritten(listing: str) -> list[str]:
    """Instructions of loops, as of ``nvdisasm -c``, that write a register which a product in flight reads."""
    found: dict[str, None] = {}
    for loop in loops(listing):
        groups: list[set[int]] = []
        open_group: set[int] = set()
        for instruction in loop + loop:  # what is in flight at the end is so at the beginning
            if wait := WAIT.match(instruction):
                groups = groups[max(0, len(groups) - int(wait[1], 16)) :]
            elif instruction.startswith("HGMMA"):
                if product := PRODUCT.match(instruction):
                    open_group |= set(range(int(product[1]), int(product[1]) + PER_OPERAND))
                if "gsb0" in instruction:
                    groups.append(open_group)
                    open_group = set()
            elif any(written(instruction) & group for group in groups):
                found[instruction] = None
    return list(found)


def loops(listing: str) -> Iterator[list[str]]:
    """The instructions of every loop, without their predicates."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append(instruction[1])
            back = BACK.match(instruction[1])
            if back and back[1] in labels:
                yield instructions[labels[back[1]] :]


def written(instruction: str) -> set[int]:
    """Registers that an instruction writes: several, where it is as wide as its name says."""
    write = WRITE.match(instruction)
    if not write or instruction.startswith(READERS):
        return set()
    name, first = write[1], int(write[2])
    several = {".128": 4, "M88.4": 4, "MT88.4": 4, ".64": 2, "M88.2": 2, "WIDE": 2}
    return set(range(first, first + max((n for part, n in several.items() if part in name), default=1)))
