"""Runs the sections one after the other and keeps whatever they find. It imports nothing that could be broken."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu.child import FAILED
from benchmarks.gpu.markdown import markdown
from benchmarks.gpu.record import read
from benchmarks.gpu.sections import SECTIONS, Section

ROOT = Path(__file__).parents[2]

MINUTES = 8.0

LEAST = 5.0
"""Seconds without which no section is begun."""

PATIENCE = 4
"""How many times its seconds a section may take when it is rehearsed: on whatever machine, beside whatever else."""

TAIL = 30
"""Lines of a section's output that are kept if it does not end well."""

EINOPS = """\
from functorch.einops import rearrange

__version__ = "not installed; PyTorch's functorch.einops in its place"
"""
"""The library needs no more of einops, and a machine with PyTorch may be without it."""

RUNNING: set[subprocess.Popen[str]] = set()
"""Sections that have not ended; more than one where they run side by side."""

BAD = ("failed", "crashed", "timed out")


class Report:
    """What has been found so far; saved whole after every section."""

    def __init__(self, folder: Path, *, rehearsal: bool, command: str) -> None:
        self.folder = folder
        self.content: dict[str, Any] = {"format": 1, "rehearsal": rehearsal, "command": command, "sections": []}
        self._name = ""

    def add(self, section: Section, status: str, seconds: float = 0.0, **found: Any) -> None:
        entry = {"name": section.name, "title": section.title, "status": status, "seconds": round(seconds, 1), **found}
        self.content["sections"].append(entry)
        self.save()

    def save(self) -> None:
        """Both files, each whole or not at all; they are named once the device is known."""
        if not self._name:
            self._name = self._free_name()
        replace(self.folder / f"{self._name}.json", json.dumps(self.content, indent=1) + "\n")
        replace(self.folder / f"{self._name}.md", markdown(self.content))

    @property
    def files(self) -> list[Path]:
        return [self.folder / f"{self._name}{suffix}" for suffix in (".md", ".json")]

    def _free_name(self) -> str:
        rows = [line for section in self.content["sections"] for line in section.get("rows", ())]
        facts = {row["name"]: row["value"] for row in rows if row["row"] == "environment"}
        device = "rehearsal" if self.content["rehearsal"] else facts.get("device", "unknown")
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        name = f"gpu-{slug}-{facts.get('date', time.strftime('%Y-%m-%d'))[:10]}"
        taken = {path.stem for path in self.folder.glob("gpu-*")}
        return next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10**6))) if n not in taken)


def main(arguments: Sequence[str] | None = None, sections: Sequence[Section] = SECTIONS) -> int:
    """Exit status 0 if nothing failed, 1 if something did, 2 if nothing was run."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments, sections)
    deadline = time.monotonic() + 60 * options.minutes
    command = shlex.join(["python", "-m", "benchmarks.gpu", *without_folders(arguments)])
    report = Report(options.out, rehearsal=options.dry, command=command)
    start = time.monotonic()
    wanted = [s for s in sections if not options.only or s.name in options.only or s.essential]
    with contextlib.ExitStack() as stack:
        caches = options.cache or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spconv-gpu-")))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spconv-gpu-")))
        for group in side_by_side(wanted):
            with ThreadPoolExecutor(len(group)) as pool, ending_with_this():
                outcomes = pool.map(lambda s: attempt(s, scratch, caches, deadline, start, dry=options.dry), group)
                for section, found in zip(group, outcomes, strict=True):
                    if section.essential and found["status"] in ("crashed", "timed out"):
                        reason = found["output"][-1] if found["output"] else found["status"]
                        print(f"{section.name}: {reason}", file=sys.stderr)
                        return 2
                    report.add(section, **found)
                    say(start, f"{section.name}: {found['status']}")
    return conclude(report, start)


def without_folders(arguments: Sequence[str]) -> list[str]:
    """The command line as it helps elsewhere: this machine's folders are nobody's business."""
    folders = ("--out", "--cache")
    shown = []
    for before, argument in zip(("", *arguments), arguments, strict=False):
        option, equals, _ = argument.partition("=")
        if before in folders:
            shown.append("DIR")
        else:
            shown.append(f"{option}=DIR" if equals and option in folders else argument)
    return shown


def side_by_side(sections: Sequence[Section]) -> list[list[Section]]:
    """Sections in their order; neighbours that may run beside each other together, every other by itself."""
    groups: list[list[Section]] = []
    for section in sections:
        if section.beside and groups and groups[-1][-1].beside:
            groups[-1].append(section)
        else:
            groups.append([section])
    return groups


def attempt(
    section: Section, scratch: Path, caches: Path, deadline: float, start: float, *, dry: bool
) -> dict[str, Any]:
    """What :func:`run` finds, unless something is missing or the time is up."""
    remaining = deadline - time.monotonic()
    missing = [name for name in needs(section, dry=dry) if importlib.util.find_spec(name) is None]
    if missing or remaining < LEAST:
        return {"status": "skipped", "reason": f"without {', '.join(missing)}" if missing else "no time left"}
    seconds = min(section.seconds * (PATIENCE if dry else 1), remaining)
    say(start, f"{section.name}: {section.title}, at most {seconds:.0f} s")
    return run(section, scratch, caches, seconds, start, dry=dry)


def parse(arguments: Sequence[str], sections: Sequence[Section]) -> argparse.Namespace:
    """The options, ``out`` a folder that can be written to."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Check and time the kernels on a GPU."
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the report (default: $OUT, or benchmarks/results)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="to be done in (default: %(default)g)")
    names = [section.name for section in sections]
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where kernels are kept (default: a fresh folder)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="SECTION", help=f"of {', '.join(names)}")
    parser.add_argument("--dry", action="store_true", help="rehearse on the CPU, at tiny sizes")
    options = parser.parse_args(arguments)
    if options.out is None:
        chosen = os.environ.get("OUT")
        options.out = Path(chosen) if chosen else ROOT / ("build/gpu" if options.dry else "benchmarks/results")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.out):
            pass
    except OSError as error:
        fail(f"--out must be a folder that can be written to, got {options.out}: {error.strerror}")
    return options


def fail(message: str) -> NoReturn:
    print(f"python -m benchmarks.gpu: {message}", file=sys.stderr)
    sys.exit(2)


def needs(section: Section, *, dry: bool) -> tuple[str, ...]:
    """Packages without which a section cannot run; the interpreter, with which a rehearsal runs kernels, is NumPy."""
    return (*section.needs, "numpy") if dry and section.interpreted else section.needs


def run(section: Section, scratch: Path, caches: Path, seconds: float, start: float, *, dry: bool) -> dict[str, Any]:
    """One section in a process of its own: how it ended, and what it found until then."""
    file = scratch / f"{section.name}.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu.child", section.target, str(file), *(["--dry"] if dry else [])]
    command += [] if section.tunes or not section.interpreted else ["--untuned"]
    began = time.monotonic()
    variables = environment(section, scratch, caches, dry=dry) | {"SPCONV_GPU_SECONDS": str(seconds)}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # what it starts ends with it
    )
    RUNNING.add(process)
    tail: deque[str] = deque(maxlen=TAIL)
    reader = threading.Thread(target=follow, args=(process, section.name, tail, start), daemon=True)
    reader.start()
    try:
        process.wait(seconds)
        status = "passed"
    except subprocess.TimeoutExpired:
        status = "timed out"
    finally:
        kill(process)
        RUNNING.discard(process)
    reader.join()
    lines = read(file)
    checks = [line for line in lines if "check" in line]
    skipped = next((line["skipped"] for line in lines if "skipped" in line), None)
    if status == "passed" and process.returncode != 0:
        status = "failed" if process.returncode == FAILED else "crashed"
    elif status == "passed" and skipped is not None:
        status = "skipped"
    return {
        "status": status,
        "seconds": time.monotonic() - began,
        "reason": skipped,
        "checks": checks,
        "rows": [line for line in lines if "row" in line],
        "notes": list(dict.fromkeys(line["note"] for line in lines if "note" in line)),
        "output": list(tail) if status in BAD else [],
    }


def environment(section: Section, scratch: Path, caches: Path, *, dry: bool) -> dict[str, str]:
    """Caches of its own for every run unless some are given: what is tuned counts, and nothing is left behind."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables["TRITON_CACHE_DIR"] = str(caches / ("layers" if section.tunes else "small"))
    variables["TORCHINDUCTOR_CACHE_DIR"] = str(caches / "inductor")
    variables["PYTHONUNBUFFERED"] = "1"
    if importlib.util.find_spec("einops") is None:
        (scratch / "einops.py").write_text(EINOPS)
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(scratch), variables.get("PYTHONPATH"))))
    if dry:
        variables |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if section.interpreted:
            variables["TRITON_INTERPRET"] = "1"
    return variables


def follow(process: subprocess.Popen[str], name: str, tail: deque[str], start: float) -> None:
    assert process.stdout is not None
    with process.stdout as output:
        for line in output:
            tail.append(line.rstrip())
            say(start, f"  {name}: {line.rstrip()}")


@contextlib.contextmanager
def ending_with_this() -> Iterator[None]:
    """Sections that run when the context is left early, by a signal say, end with it."""
    try:
        yield
    finally:
        for process in list(RUNNING):
            kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """The process, if it still runs, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def conclude(report: Report, start: float) -> int:
    """Says last what matters most: the end of an output is what is kept of it."""
    sections = report.content["sections"]
    failures = [(s["name"], c) for s in sections for c in s.get("checks", ()) if not c["passed"]]
    for name, check in failures:
        print(f"FAILED {name}: {check['check']}: {check['message'].splitlines()[-1][:200]}")
    for section in sections:
        passed = sum(check["passed"] for check in section.get("checks", ()))
        reason = f" ({section['reason']})" if section.get("reason") else ""
        print(f"{section['name']:<12} {section['status']}{reason}, {passed} checks passed, {section['seconds']:.0f} s")
    say(start, "wrote " + ", ".join(map(str, report.files)))
    return 1 if any(section["status"] in BAD for section in sections) else 0


def replace(path: Path, text: str) -> None:
    """Write ``path`` whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def say(start: float, text: str) -> None:
    print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)
