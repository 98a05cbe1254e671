"""A fingerprint changes with whatever changes machine code, and with nothing else."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton

from spconv_triton.dispatch import HAS_TRITON, INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs compiled kernels: runs natively", allow_module_level=True)

from benchmarks.fingerprint import fingerprint
from benchmarks.machine_code import compile_kernel

SOURCE = '''
import triton
import triton.language as tl

FACTOR = tl.constexpr(2.0)


@triton.jit
def scaled(x):
    """Twice."""
    return x * FACTOR


@triton.jit(do_not_specialize=["n"])
def kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Scales a vector."""
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, scaled(tl.load(x_ptr + i, mask=i < n)), mask=i < n)
'''

Loader = Callable[[str], ModuleType]


@pytest.fixture
def source(tmp_path: Path) -> Loader:
    """A module of its own for each text."""
    loaded = 0

    def load(text: str) -> ModuleType:
        nonlocal loaded
        loaded += 1
        file = tmp_path / f"kernels_{loaded}.py"
        file.write_text(text)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def name(
    module: ModuleType,
    target: str = "sm_90",
    dtype: torch.dtype = torch.float32,
    n: int = 7,
    warps: int = 4,
    block: int = 128,
) -> str:
    x: Any = torch.empty(block, dtype=dtype, device="meta")
    return fingerprint(module.kernel, target, triton.Config({}, num_warps=warps), x, x, n, BLOCK=block)


def test_what_decides_the_code_changes_it(source: Loader) -> None:
    base = name(source(SOURCE))
    others = [
        name(source(SOURCE), target="sm_80"),
        name(source(SOURCE), target="gfx942"),
        name(source(SOURCE), dtype=torch.float16),
        name(source(SOURCE), warps=8),
        name(source(SOURCE), block=256),
        name(source(SOURCE.replace("i < n)), mask", "i <= n)), mask"))),
        name(source(SOURCE.replace("return x * FACTOR", "return FACTOR + x"))),
        name(source(SOURCE.replace("constexpr(2.0)", "constexpr(3.0)"))),
        name(source(SOURCE.replace('do_not_specialize=["n"]', "do_not_specialize=[]")), n=16),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_what_does_not_leaves_it(source: Loader) -> None:
    base = name(source(SOURCE))
    assert name(source(SOURCE), n=16) == base
    commented = SOURCE.replace("    i = ", "    # The elements.\n    i = ").replace("Twice", "Two times")
    assert name(source("\n\n\nUNUSED = 1\n" + commented)) == base


def test_naming_compiles_nothing_and_hides_nothing(source: Loader) -> None:
    module = source(SOURCE)
    x = torch.empty(128, device="meta")
    config = triton.Config({}, num_warps=4)
    before = fingerprint(module.kernel, "sm_90", config, x, x, 7, BLOCK=128)
    assert set(module.kernel.device_caches) == {"cuda:90 describe"}
    compiled = compile_kernel(module.kernel, "sm_90", config, x, x, 7, BLOCK=128)
    assert compiled.asm["cubin"]
    assert fingerprint(module.kernel, "sm_90", config, x, x, 7, BLOCK=128) == before
