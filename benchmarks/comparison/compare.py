"""``python -m benchmarks.comparison.compare BASE``: is the working tree slower than revision BASE?

Both libraries are timed by this tree's benchmarks, each in a process of its own, on the layers of the quick mode, or
on ResNet-50's at batches of 64.
Within each round both run once, in turns, and ratios are taken within it. ``nn.Conv2d`` is the same in both: how it
differs is noise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.comparison.probe import NAMES
from benchmarks.competitors import DEVICE
from benchmarks.ratios import SAMPLE_SECONDS, quantiles
from benchmarks.turns import round_count
from spconv_triton.training.cli import count

ROOT = Path(__file__).parents[2]

MARGIN = 0.02
"""What is never flagged: a fiftieth, by which code moves when its neighbours in memory do."""

PREFIX = "bench-compare-"
"""Of the names of temporary folders."""


class Verdict(NamedTuple):
    """Of one comparison.

    Attributes:
        ratio: time in BASE over time here, round by round: 20, 50, 80 %. Below 1 is slower than BASE.
        control: the same of nn.Conv2d.
        slower: whether ``ratio`` is below 1 by more than noise.
    """

    ratio: tuple[float, float, float]
    control: tuple[float, float, float]
    slower: bool


def judge(base: Sequence[dict[str, float]], here: Sequence[dict[str, float]]) -> Verdict:
    """Slower is: all of the middle three fifths of the rounds are, and their median by more than the control's spread.

    Args:
        base, here: seconds of nn.Conv2d and of SPConv, round by round.
    """
    control, ratio = (quantiles([b[name] / h[name] for b, h in zip(base, here, strict=True)]) for name in NAMES)
    noise = max(MARGIN, *(abs(1 - value) for value in control))
    return Verdict(ratio, control, ratio[2] < 1 and ratio[1] < 1 - noise)


class Probe:
    """A process that times one revision.

    Args:
        tree: folder with ``spconv_triton``, ``benchmarks`` and ``tests``.

    Raises:
        RuntimeError: it died, or imports the library from elsewhere.
    """

    def __init__(self, tree: Path, plan: str, sample: float, threads: int | None) -> None:
        command = [sys.executable, "-m", "benchmarks.comparison.probe", plan, str(sample)]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        if threads is not None:
            environment["PROBE_THREADS"] = str(threads)
        self.process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        where = Path(self.ask(where=True)).resolve()
        expected = (tree / "spconv_triton").resolve()
        if expected not in where.parents:
            raise RuntimeError(f"spconv_triton should be imported from {expected}, got {where}")

    def ask(self, **order: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the end of its answers says the same
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that times a revision ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def trees(base: str) -> Iterator[tuple[Path, Path]]:
    """A folder for BASE and one for here: each revision's library, this tree's benchmarks and tests."""
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        checkout = Path(folder) / "checkout"
        _git("worktree", "add", "--quiet", "--detach", str(checkout), base)
        try:
            made = []
            for name, source in (("base", checkout), ("here", ROOT)):
                tree = Path(folder) / name
                tree.mkdir()
                (tree / "spconv_triton").symlink_to(source / "spconv_triton")
                for shared in ("benchmarks", "tests"):
                    (tree / shared).symlink_to(ROOT / shared)
                made.append(tree)
            yield made[0], made[1]
        finally:
            _git("worktree", "remove", "--force", str(checkout))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a layer is slower than in BASE, 2 where BASE is no revision."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison.compare", description="against a revision")
    parser.add_argument("base", help="a revision, as git knows it")
    parser.add_argument("--rounds", type=round_count, default=15, help="of each layer (default: %(default)s)")
    parser.add_argument("--threads", type=count, help="of a CPU (default: PyTorch's)")
    parser.add_argument("--large", action="store_true", help="ResNet-50's layers at batches of 64: five minutes")
    parser.add_argument("--rehearse", action="store_true", help="few layers, two rounds: shows that it runs")
    options = parser.parse_args(arguments)
    if DEVICE != "cpu":
        parser.error("float32 would be TF32 on a GPU: hide it (CUDA_VISIBLE_DEVICES=)")
    plan, rounds, sample = "large" if options.large else "quick", options.rounds, SAMPLE_SECONDS
    if options.rehearse:
        plan, rounds, sample = "rehearsal", 2, 0.0
    slower = []
    try:
        with ExitStack() as stack:
            folders = stack.enter_context(trees(options.base))
            probes = []
            for folder in folders:
                probes.append(Probe(folder, plan, sample, options.threads))
                stack.callback(probes[-1].close)
            print(f"SPConv: time in {options.base} / time here, median (20 % to 80 %) of {rounds} rounds\n")
            print("| layer | SPConv | nn.Conv2d: noise | |\n|---|---:|---:|---|")
            for name, verdict in compare(probes, rounds):
                cells = [f"{m:.3f} ({low:.3f} to {high:.3f})" for low, m, high in (verdict.ratio, verdict.control)]
                print(f"| {name} | {cells[0]} | {cells[1]} | {'SLOWER' if verdict.slower else ''} |", flush=True)
                slower += [name] if verdict.slower else []
    except (subprocess.CalledProcessError, RuntimeError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(f"\n{len(slower)} slower than {options.base}" if slower else f"\nnothing is slower than {options.base}")
    return int(bool(slower))


def compare(probes: Sequence[Probe], rounds: int) -> Iterator[tuple[str, Verdict]]:
    """Each comparison of the plan by name, with what came of it."""
    index = 0
    while True:
        name, _ = (probe.ask(open=index) for probe in probes)
        if name is None:
            return
        taken: list[list[dict[str, float]]] = [[], []]
        for turn in range(rounds):
            for side in ((0, 1), (1, 0))[turn % 2]:  # neither always runs in the wake of the other
                taken[side].append(probes[side].ask(round=True))
        yield name, judge(*taken)
        index += 1


def _git(*arguments: str) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"git {arguments[0]} {arguments[1]}: {done.stderr.strip()}")


if __name__ == "__main__":
    sys.exit(main())
