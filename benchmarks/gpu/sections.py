"""What the kit does, in this order: the most valuable first, for the time may run out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A part of the kit, run in a process of its own.

    Attributes:
        name: what ``--only`` calls it.
        title: what the report calls it.
        target: ``"module:function"``; the function takes a :class:`benchmarks.gpu.record.Record`.
        seconds: it may take at most so many.
        interpreted: whether a rehearsal runs it in Triton's interpreter, because it runs kernels.
        essential: whether nothing else makes sense if it fails.
        beside: whether it runs beside its neighbours of which that is true too: it checks, and times nothing.
        tunes: whether it times real layers. The others have a cache of Triton's to themselves, for the tuner remembers
            a choice for every size of a layer, and their layers are small.
        needs: packages besides torch and triton without which it is skipped.
    """

    name: str
    title: str
    target: str
    seconds: int
    interpreted: bool = True
    essential: bool = False
    beside: bool = False
    tunes: bool = False
    needs: tuple[str, ...] = ()


SECTIONS = (
    Section("environment", "Environment", "benchmarks.gpu.environment:environment", 60, False, essential=True),
    Section("compile", "Compiling ahead", "benchmarks.gpu.precompile:precompile", 90, False),
    Section("correctness", "Against float64", "benchmarks.gpu.checks:correctness", 90, beside=True),
    Section("graphs", "CUDA graphs", "benchmarks.gpu.checks:graphs", 90, beside=True),
    Section("operators", "Operators", "benchmarks.gpu.checks:operators", 90, beside=True),
    Section("dynamo", "torch.compile", "benchmarks.gpu.checks:dynamo", 90, beside=True),
    Section("kernels", "The kernels' tests", "benchmarks.gpu.suite:kernels", 75, beside=True, needs=("pytest",)),
    Section("layers", "ResNet-50's layers", "benchmarks.gpu.layers:layers", 150, tunes=True),
    Section("single", "One image", "benchmarks.gpu.layers:single", 90, tunes=True),
    Section("parts", "The kernels of a layer", "benchmarks.gpu.parts:parts", 60, tunes=True),
    Section("host", "What a call takes on the host", "benchmarks.gpu.host:host", 45, tunes=True),
    Section("variants", "Compiled, flat, separate", "benchmarks.gpu.layers:variants", 120, tunes=True),
    Section("single-variants", "One image in other ways", "benchmarks.gpu.layers:single_variants", 90, tunes=True),
    Section("memory", "Memory", "benchmarks.gpu.layers:memory", 60, tunes=True),
    Section("networks", "ResNet-50 whole", "benchmarks.gpu.networks:networks", 120, tunes=True),
    Section("others", "Other layers and dtypes", "benchmarks.gpu.layers:others", 120, tunes=True),
    Section("compile-tiles", "Compiling tiles ahead", "benchmarks.gpu.precompile:precompile_tiles", 90, False),
    Section("tiles", "Tiles chosen and tiles that may be", "benchmarks.gpu.tiles:tiles", 90, tunes=True),
    Section("model", "The model", "benchmarks.gpu.model:model", 60, False, needs=("numpy",)),
)
