"""Compile on every core what the other sections will launch: one after the other they would wait for it for minutes.

``python -m benchmarks.gpu.precompile DIR --capability 9.0`` does so where there is no GPU, for one whose minutes are
counted: with DIR at the same place on its machine, and the same PyTorch, Triton and Python there, ``python -m
benchmarks.gpu --cache DIR`` compiles nothing again. Of what it writes, ``*.cubin`` and ``*.json`` are enough.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from cases import Case

from benchmarks.gpu import plan, tiles
from benchmarks.gpu.checks import multiplied_as
from benchmarks.gpu.record import Record
from benchmarks.launches import (
    CAPABILITIES,
    Launch,
    backward_launches,
    compile_launch,
    forward_launches,
    fusion_launches,
    recording,
)
from benchmarks.machine_code import TARGETS

SECONDS = 75
"""After so many the rest is left to those who need it."""


class Job(NamedTuple):
    """A layer as one path launches it.

    Attributes:
        capability: of the device.
        path: as of :func:`spconv_triton.launch.spconv2d`, ``"separate"`` for U3 and the fusion by themselves, or
            ``"tiles"`` for the kernels over descriptors in every tile that is tried.
        precision: of float32 convolutions.
        cache: which of Triton's caches it is for; see :attr:`benchmarks.gpu.sections.Section.tunes`.
    """

    case: Case
    dtype: torch.dtype
    capability: tuple[int, int]
    path: str
    precision: str
    cache: str


class Task(NamedTuple):
    """One configuration of one launch of a job."""

    job: Job
    launch: int
    config: int


def precompile(record: Record) -> None:
    """What all sections but the tiles' launch, in their order."""
    _compile_all(record, jobs)


def precompile_tiles(record: Record) -> None:
    """The kernels over descriptors in every tile that is tried."""
    _compile_all(record, tile_jobs)


def _compile_all(record: Record, jobs_on: Callable[[tuple[int, int]], Iterator[Job]]) -> None:
    capability = (9, 0) if record.rehearsal else torch.cuda.get_device_capability()
    target = target_of(capability)
    if target not in TARGETS:
        record.skip(f"this device is {target}, and compiling ahead knows {', '.join(TARGETS)}")
        return
    tasks = list(unique(jobs_on(capability)))
    if record.rehearsal:
        tasks = tasks[:2]
    start = time.monotonic()
    done = failed = 0
    for error in compiled(tasks, target, 1 if record.rehearsal else os.cpu_count()):
        done += 1
        if error:
            failed += 1
            record.note(f"did not compile: {error}")
        if time.monotonic() - start > SECONDS:
            break
    record.note(
        f"{done} of {len(tasks)} kernels compiled for {target} in {time.monotonic() - start:.0f} s, {failed} failed"
    )


def target_of(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def compiled(tasks: Sequence[Task], target: str, processes: int | None) -> Iterator[str]:
    """For each task in turn an empty string, or what went wrong, as soon as it is done."""
    # Not forked: this process has threads, and the workers need nothing of it.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(functools.partial(_compile, target), tasks)


def jobs(capability: tuple[int, int]) -> Iterator[Job]:
    timed = (plan.layers, plan.single, plan.variants, plan.single_variants, plan.others)
    entries = [("small", entry) for entry in plan.checked(rehearsal=False)]
    entries += [("layers", entry) for entries_of in timed for entry in entries_of(rehearsal=False)]
    entries += [("layers", entry) for entry in plan.network()]
    for cache, (case, dtype, names) in entries:
        paths = ["auto"] if "triton" in names or "descriptor" in names else []
        paths += [name for name in ("flat", "separate") if name in names]
        # What is checked in float32 is checked in either precision.
        precisions = ("tf32", "ieee") if cache == "small" and dtype == torch.float32 else ("tf32",)
        for path, precision in itertools.product(paths, precisions):
            yield Job(case, dtype, capability, path, precision, cache)


def tile_jobs(capability: tuple[int, int]) -> Iterator[Job]:
    for case, dtype, _ in plan.tiles(rehearsal=False) if capability[0] in (9, 10) else ():
        yield Job(case, dtype, capability, "tiles", "tf32", "layers")


def unique(jobs: Iterable[Job]) -> Iterator[Task]:
    """Every configuration of every launch, those that come to the same once."""
    seen = set()
    for job in jobs:
        for index, launch in enumerate(launches(job)):
            arguments = tuple((n, _specialised(a)) for n, a in launch.arguments.items())
            for number, config in enumerate(launch.configs):
                key = launch.name, arguments, tuple(map(str, launch.constants.items())), str(config), job.cache
                if key not in seen:
                    seen.add(key)
                    yield Task(job, index, number)


@functools.lru_cache(maxsize=8)
def launches(job: Job) -> list[Launch]:
    """Forward and backward."""
    case, dtype, capability, path, precision, _ = job
    with multiplied_as(precision):
        if path == "tiles":
            return list(tile_launches(case, dtype, capability))
        if path != "separate":
            forward = forward_launches(case, dtype, capability, path=path)
            return forward + backward_launches(case, dtype, capability, path=path)
        branch = replace(case, in_channels=case.representative, alpha=1.0)
        found = forward_launches(branch, dtype, capability) + backward_launches(branch, dtype, capability)
        return found + fusion_launches(case, dtype)


def tile_launches(case: Case, dtype: torch.dtype, capability: tuple[int, int]) -> Iterator[Launch]:
    """Of every kernel over descriptors, in every tile."""
    for kernel in tiles.kernels(case, dtype, "meta"):
        for tile in dict.fromkeys((kernel.chosen, *kernel.others)):
            with recording(capability) as found, kernel.with_tile(tile):
                kernel.call()
            yield from found


def _specialised(argument: object) -> object:
    """What Triton compiles an argument for."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    if isinstance(argument, int):
        return "1" if argument == 1 else argument % 16 == 0
    return str(argument)


def _compile(target: str, task: Task) -> str:
    """An empty string, or what went wrong."""
    job, index, number = task
    os.environ["TRITON_CACHE_DIR"] = str(Path(os.environ["TRITON_CACHE_DIR"]).with_name(job.cache))
    launch = launches(job)[index]
    config = launch.configs[number]
    try:
        compile_launch(launch, target, config)
    except Exception as error:
        return f"{launch.name} with {config} for {job.case.name}: {error!r}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if a kernel did not compile."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.precompile", description="Compile the kit's kernels."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="to keep them in")
    parser.add_argument("--capability", default="9.0", help="compute capability of the GPU (default: %(default)s)")
    parser.add_argument(
        "--tiles", action="store_true", help="also those of the tiles that are tried, three times as many"
    )
    options = parser.parse_args(arguments)
    major, _, minor = options.capability.partition(".")
    if not (major.isdecimal() and minor.isdecimal()) or target_of((int(major), int(minor))) not in TARGETS:
        known = ", ".join(".".join(map(str, found)) for found in CAPABILITIES.values() if found)
        parser.error(f"--capability must be one of {known}, got {options.capability}")
    capability = int(major), int(minor)
    os.environ["TRITON_CACHE_DIR"] = str(options.folder.resolve() / "layers")
    tasks = list(unique(itertools.chain(jobs(capability), tile_jobs(capability) if options.tiles else ())))
    failures = [error for error in compiled(tasks, target_of(capability), os.cpu_count()) if error]
    print(*failures, f"{len(tasks) - len(failures)} of {len(tasks)} kernels in {options.folder}", sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
