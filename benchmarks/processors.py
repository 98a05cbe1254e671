"""What a processor of each kind of GPU holds and does in a cycle, and how many programs of a kernel it takes at once.

Nothing here was measured: limits are the vendors', and cycles follow from them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

KIB = 1024

TENSOR_COLUMNS = 512
"""Of tensor memory, on a processor of sm_100."""


class Processor(NamedTuple):
    """A streaming multiprocessor, or AMD's compute unit. It has four parts, each with a quarter of the registers.

    Attributes:
        warp: threads of one.
        registers: of all threads together.
        register_step: registers of a thread are allocated in multiples of this.
        warps, programs: at most so many at a time.
        shared_bytes: of all programs together.
        program_shared_bytes: a program may have at most so many.
        reserved_bytes: of shared memory, taken by the system from each program.
    """

    warp: int
    registers: int
    register_step: int
    warps: int
    programs: int
    shared_bytes: int
    program_shared_bytes: int
    reserved_bytes: int


PROCESSORS = {
    # CUDA's cuda_occupancy.h, and the technical specifications in its programming guide.
    "sm_80": Processor(32, 65536, 8, 64, 32, 164 * KIB, 163 * KIB, KIB),
    "sm_90": Processor(32, 65536, 8, 64, 32, 228 * KIB, 227 * KIB, KIB),
    "sm_100": Processor(32, 65536, 8, 64, 32, 228 * KIB, 227 * KIB, KIB),
    "sm_120": Processor(32, 65536, 8, 48, 24, 100 * KIB, 99 * KIB, KIB),
    # AMD's CDNA 3 instruction set manual: 512 vector registers a lane in each of four SIMDs, 8 waves in each; LLVM's
    # AMDGPU backend: 16 work groups of more than one wave.
    "gfx942": Processor(64, 131072, 8, 32, 16, 64 * KIB, 64 * KIB, 0),
}

PRODUCTS_PER_CYCLE = {
    ("sm_80", "HMMA", 16): 1024,  # NVIDIA's A100 white paper: dense fused multiply-adds of a processor and cycle
    ("sm_80", "HMMA", 8): 512,  # TF32, by the depth of its instructions
    ("sm_80", "HMMA", 4): 512,
    ("sm_90", "HGMMA", 16): 2048,  # the H100 white paper: twice as many
    ("sm_90", "HGMMA", 8): 1024,
}
"""Multiply-adds, by target, instruction and depth. Others are left out: their rate depends on the product (sm_120), or
the instruction does not tell its shape (sm_100)."""


def programs(target: str, registers: int, shared_bytes: int, warps: int, tensor_columns: int = 0) -> int:
    """How many programs share a processor: by registers, shared memory, warps, and tensor memory if it is used.

    As CUDA's occupancy calculator has it: registers are allocated to whole warps, in each part separately.
    """
    p = PROCESSORS[target]
    allocated = max(1, math.ceil(registers / p.register_step)) * p.register_step * p.warp
    resident = min(p.warps, 4 * (p.registers // 4 // allocated))
    limits = [p.programs, resident // warps]
    if shared_bytes:
        limits.append(p.shared_bytes // (shared_bytes + p.reserved_bytes))
    if shared_bytes > p.program_shared_bytes:
        limits.append(0)
    if tensor_columns:
        limits.append(TENSOR_COLUMNS // tensor_columns)
    return min(limits)


def issue_cycles(target: str, instructions: int, warps: int) -> float | None:
    """How long the four schedulers take to issue a step's instructions, one a cycle each; None for AMD, where an
    instruction of 64 threads takes several."""
    return None if target.startswith("gfx") else instructions * warps / 4


def tensor_cycles(target: str, products: Mapping[str, int], warps: int) -> float | None:
    """How long the tensor cores take for a step's products.

    An instruction multiplies [m, k] by [k, n], for one warp, or for four at once where it begins with HG:
    HGMMA.64x128x16 is m, n, k; HMMA.16816 is 16, 8, 16. Cycles are m n k over :data:`PRODUCTS_PER_CYCLE`, times the
    warps or groups of four that execute it: HGMMA.64xNx16 takes N / 2, as does the TF32 form of half the depth and half
    the rate.

    Args:
        products: mnemonics with modifiers, and how many of each.

    Returns:
        None where an instruction's shape or rate is not known, or there is none.
    """
    cycles = 0.0
    for mnemonic, number in products.items():
        shape = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\b|HMMA\.(16)(8)(16|8|4)\b", mnemonic)
        if shape is None:
            return None
        m, n, k = (int(size) for size in shape.groups() if size)
        name = mnemonic.partition(".")[0]
        rate = PRODUCTS_PER_CYCLE.get((target, name, k))
        if rate is None:
            return None
        cycles += number * (warps / 4 if name == "HGMMA" else warps) * m * n * k / rate
    return cycles or None
