"""What the figures are taken on, and what it can do at most."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu.device import Device, device_of
from benchmarks.gpu.record import Record

ROOT = Path(__file__).parents[2]

QUERY = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,utilization.gpu"

OPTIONAL = ("numpy", "pytest", "einops", "triton")


def environment(record: Record) -> None:
    if not (record.rehearsal or torch.cuda.is_available()):
        sys.exit("there is no CUDA device; DRY=1 (--dry) rehearses the kit without one")
    device = device_of(record)
    facts = {
        "device": "none: a rehearsal",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
    }
    if not record.rehearsal:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "L2 cache": f"{getattr(properties, 'L2_cache_size', 0) / 2**20:.0f} MiB",
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            "nvidia-smi": _output("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"),
        }
    facts |= {
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in OPTIONAL},
        "revision": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"),
    }
    for name, value in facts.items():
        record.row("environment", name=name, value=value)
    with record.check("a copy and a matrix product", device.synchronize):
        ceilings(record, device)


def ceilings(record: Record, device: Device) -> None:
    """What a copy and a matrix product reach here, to hold the other figures against."""
    side, elements = (64, 1024) if record.rehearsal else (8192, 2**29)
    source = torch.randn(elements // 2, device=device.name).view(torch.int16)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device.name, dtype=torch.bfloat16) for _ in range(2))
    calls = (lambda: target.copy_(source), lambda: left @ right)
    seconds = [min(times) for times in zip(*(device.sample(calls) for _ in range(10)), strict=True)]
    record.row("ceilings", what="copy, read + written (TB/s)", value=2 * source.nbytes / seconds[0] / 1e12)
    record.row("ceilings", what=f"bfloat16 product of {side} x {side} (TFLOP/s)", value=2 * side**3 / seconds[1] / 1e12)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    return str(getattr(importlib.import_module(package), "__version__", "unknown"))
