"""Compile a Triton kernel for a GPU that this machine does not have, and read what came out."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

INSTRUCTION = r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)"

PRODUCTS = {"HMMA", "HGMMA", "UTCHMMA"}
"""Tensor-core products of sm_80, sm_90 and sm_100."""


class CompileOnlyDriver:
    """Stands for the driver of a GPU that is not there; it answers what ``warmup`` asks, and launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # Compiled kernels are kept per device: one "device" for each target.
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: Any = None) -> int:  # noqa: ARG002
        return 0

    def get_active_torch_device(self) -> torch.device:
        raise RuntimeError("there is no device: this driver only compiles")


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """Make ``target`` Triton's active device."""
    drivers = triton.runtime.driver
    previous = drivers.__dict__.get("_active")
    drivers.set_active(CompileOnlyDriver(TARGETS[target]))
    try:
        yield
    finally:
        drivers._active = previous


def compile_kernel(kernel: Any, target: str, config: triton.Config, *args: Any, **constants: Any) -> Any:
    """The kernel as a launch with these arguments would compile it; tensors may be on ``meta``."""
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    with compiling_for(target):
        return kernel.warmup(*args, grid=(1,), **constants, **config.all_kwargs())


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a processor."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    opcodes: tuple[str, ...]

    def count(self, opcode: str) -> int:
        return self.opcodes.count(opcode)


def resources(compiled: Any) -> Resources:
    """Registers, spills (stack and local memory, bytes a thread), shared memory and instructions in program order."""
    shared = compiled.metadata.shared
    if compiled.metadata.target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        number = {
            name: int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])
            for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        }
        opcodes = tuple(re.findall(r"^\s+([a-z]\w+)", assembly, re.M))
        spilled = number["vgpr_spill_count"] + number["sgpr_spill_count"] + number["private_segment_fixed_size"]
        return Resources(number["vgpr_count"], spilled, shared, opcodes)
    usage, sass = _disassemble(compiled)
    number = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = tuple(re.findall(f"^{INSTRUCTION}", sass, re.M))
    return Resources(number["REG"], number["STACK"] + number["LOCAL"], shared, opcodes)


def hot_loop(compiled: Any) -> tuple[str, ...]:
    """Instructions of one step of the shortest loop with the most tensor-core products, as all but one step runs them.

    A branch forward over multiplications is the gate: it is taken once, and left out.
    """
    position = 0
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    branches: list[tuple[int, str]] = []
    for line in _disassemble(compiled)[1].splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = position
        elif instruction := re.match(INSTRUCTION, line):
            opcodes.append(instruction[1])
            if target := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line):
                branches.append((position, target[1]))
            position += 1
    jumps = [(source, labels[label]) for source, label in branches]
    # What is compiled behind the end, such as a wait that takes long, jumps back as well, and is no loop.
    loops = [(b, a + 1) for a, b in jumps if b <= a and "EXIT" not in opcodes[b:a]]
    products = {loop: sum(op in PRODUCTS for op in opcodes[slice(*loop)]) for loop in loops}
    start, stop = min(loops, key=lambda loop: (-products[loop], loop[1] - loop[0]))
    once = {
        position
        for source, target in jumps
        if start <= source < target <= stop and any(op.startswith("FMUL") for op in opcodes[source + 1 : target])
        for position in range(source + 1, target)
    }
    return tuple(opcodes[i] for i in range(start, stop) if i not in once)


def _disassemble(compiled: Any) -> tuple[str, str]:
    """Resource usage and machine code of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        return usage, _run(knobs.nvidia.nvdisasm.path, "-c", str(cubin))


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
