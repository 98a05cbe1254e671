"""Compile a Triton kernel for a GPU that this machine does not have, and read what came out."""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from benchmarks.operands_in_flight import overwritten

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA", "v_mfma", "v_smfmac")
"""How the tensor cores' products begin: of sm_80 and sm_120, of sm_90, of sm_100, of AMD."""

VECTOR_PRODUCTS = ("FFMA", "v_fma_f32", "v_fmac_f32", "v_pk_fma_f32")
"""Those of float32 where it is multiplied as such."""

MULTIPLICATIONS = ("FMUL", "v_mul_f32", "v_pk_mul_f32")

LOCAL = ("LDL", "STL", "scratch_")
"""How loads and stores of a thread's own memory begin, where registers are spilled to."""

_devices = itertools.count()


class CompileOnlyDriver:
    """Stands for the driver of a GPU that is not there; it answers what ``warmup`` asks, and launches nothing."""

    def __init__(self, target: GPUTarget, purpose: str) -> None:
        self.target = target
        self.purpose = purpose

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # Compiled kernels are kept per device: one "device" for each target and purpose.
        return f"{self.target.backend}:{self.target.arch} {self.purpose}"

    def get_current_stream(self, device: Any = None) -> int:  # noqa: ARG002
        return 0

    def get_active_torch_device(self) -> torch.device:
        raise RuntimeError("there is no device: this driver only compiles")


@contextlib.contextmanager
def compiling_for(target: str, purpose: str = "compile") -> Iterator[None]:
    """Make ``target`` Triton's active device; what is compiled for one purpose is not found by another."""
    drivers = triton.runtime.driver
    previous = drivers.__dict__.get("_active")
    drivers.set_active(CompileOnlyDriver(TARGETS[target], purpose))
    try:
        yield
    finally:
        drivers._active = previous


def jit_function(kernel: Any) -> triton.JITFunction:
    """The kernel without its tuner."""
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    return kernel


def compile_kernel(
    kernel: Any, target: str, config: triton.Config, *args: Any, fresh: bool = False, **constants: Any
) -> Any:
    """The kernel as a launch with these arguments would compile it; tensors may be on ``meta``.

    Args:
        fresh: whatever was compiled before, in this process or on disk, is not looked at.
    """
    function = jit_function(kernel)
    with contextlib.ExitStack() as stack:
        if fresh:
            device = f"compile {next(_devices)}"
            stack.enter_context(knobs.cache.scope())
            knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(compiling_for(target, device))
            stack.callback(function.device_caches.pop, triton.runtime.driver.active.get_current_device(), None)
        else:
            stack.enter_context(compiling_for(target))
        options = {"launch_pdl": True} if constants.get("OVERLAP") else {}  # as launched; a key of Triton's cache
        return function.warmup(*args, grid=(1,), **constants, **options, **config.all_kwargs())


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel: what it takes of a processor, and its instructions.

    Attributes:
        registers: of a thread.
        spilled_bytes: stack and local memory of a thread; on AMD, spilled registers and scratch.
        shared_bytes: of a program.
        tensor_memory: columns that a program allocates, on sm_100.
        instructions: mnemonics with their modifiers, in program order.
        loop: those of one step of the hot loop (see :func:`_hot_loop`), empty if nothing is multiplied in one.
        looped: those of all innermost loops that multiply.
        overwritten: how many write what a product in flight reads; see :mod:`.operands_in_flight`.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_memory: int
    instructions: tuple[str, ...]
    loop: tuple[str, ...]
    looped: tuple[str, ...]
    overwritten: int = 0

    def count(self, opcode: str) -> int:
        """How many instructions are of this opcode, whatever their modifiers."""
        return count(self.instructions, opcode)


def opcode(instruction: str) -> str:
    """A mnemonic without its modifiers."""
    return instruction.partition(".")[0]


def count(instructions: Iterable[str], *opcodes: str) -> int:
    """How many are of one of these opcodes, whatever their modifiers."""
    return sum(opcode(instruction) in opcodes for instruction in instructions)


def is_product(instruction: str) -> bool:
    """Whether the tensor cores compute it."""
    return instruction.startswith(PRODUCTS)


def read(compiled: Any) -> MachineCode:
    """What the compiler made of a kernel."""
    shared = compiled.metadata.shared
    if compiled.metadata.target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        number = {
            name: int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])  # type: ignore[index]
            for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        }
        spilled = number["vgpr_spill_count"] + number["sgpr_spill_count"] + number["private_segment_fixed_size"]
        registers, tensor_memory, listing, raced = number["vgpr_count"], 0, _read_assembly(assembly), 0
    else:
        usage, machine_code = _disassemble(compiled)
        number = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        registers, spilled = number["REG"], number["STACK"] + number["LOCAL"]
        tensor_memory, listing = compiled.metadata.tmem_size, _read_machine_code(machine_code)
        raced = len(overwritten(machine_code))
    loop, looped = _hot_loop(listing)
    return MachineCode(registers, spilled, shared, tensor_memory, tuple(listing.instructions), loop, looped, raced)


class _Listing(NamedTuple):
    """Mnemonics in program order, and the branches among them: positions of source and target."""

    instructions: list[str]
    jumps: list[tuple[int, int]]


def _read_machine_code(text: str) -> _Listing:
    """The listing of nvdisasm."""
    pattern = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)")
    return _read_listing(text, re.compile(r"(\.L_x_\d+):"), pattern, re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)"))


def _read_assembly(text: str) -> _Listing:
    """AMD's assembly."""
    return _read_listing(
        text,
        re.compile(r"(\.LBB\d+_\d+):"),
        re.compile(r"\s+([a-z]\w+)"),
        re.compile(r"\bs_c?branch\w*\s+(\.LBB\d+_\d+)"),
    )


def _read_listing(text: str, label: re.Pattern, instruction: re.Pattern, branch: re.Pattern) -> _Listing:
    labels: dict[str, int] = {}
    instructions: list[str] = []
    branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        if found := label.match(line):
            labels[found[1]] = len(instructions)
        elif found := instruction.match(line):
            if target := branch.search(line):
                branches.append((len(instructions), target[1]))
            instructions.append(found[1])
    return _Listing(instructions, [(source, labels[name]) for source, name in branches])


def _hot_loop(listing: _Listing) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Instructions of one step of the hot loop, and of every innermost loop that multiplies.

    Products are the tensor cores', or multiply-adds where a kernel has none of those. The hot loop is the shortest with
    the most of them, as most steps run it: what a branch forward skips if it has multiplications, and no products, is
    done once, and left out.
    """
    instructions, jumps = listing
    products = PRODUCTS if any(map(is_product, instructions)) else VECTOR_PRODUCTS
    # What is compiled behind the end, such as a wait that takes long, jumps back as well, and is no loop.
    loops = [(b, a + 1) for a, b in jumps if b <= a and not count(instructions[b:a], "EXIT", "s_endpgm")]
    held = {loop: sum(i.startswith(products) for i in instructions[slice(*loop)]) for loop in loops}
    multiplying = [loop for loop in held if held[loop]]
    if not multiplying:
        return (), ()
    start, stop = min(multiplying, key=lambda loop: (-held[loop], loop[1] - loop[0]))
    once = {
        position
        for source, target in jumps
        if start <= source < target <= stop
        and any(i.startswith(MULTIPLICATIONS) for i in instructions[source + 1 : target])
        and not any(i.startswith(products) for i in instructions[source + 1 : target])
        for position in range(source + 1, target)
    }
    innermost = [
        loop for loop in multiplying if not any(loop[0] <= a and b <= loop[1] for a, b in multiplying if (a, b) != loop)
    ]
    return (
        tuple(instructions[i] for i in range(start, stop) if i not in once),
        tuple(i for loop in innermost for i in instructions[slice(*loop)]),
    )


def _disassemble(compiled: Any) -> tuple[str, str]:
    """Resource usage and machine code of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        return usage, _run(knobs.nvidia.nvdisasm.path, "-c", str(cubin))


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
