"""The version matrix: the suite on other releases of Python, PyTorch, Triton and NumPy than the pinned ones.

``nox`` runs every session that has an interpreter here, ``nox -s "matrix(torch211-py310)"`` one of them, and
``nox -- full`` the whole suite in each. A session writes its row of ``tests/version_matrix.md`` itself.

A CPU build (``+cpu``) is not on PyPI: say where it is by ``UV_FIND_LINKS`` or ``UV_INDEX`` (``PIP_...`` without uv).
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nox

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "uv|venv"
nox.options.error_on_missing_interpreters = False

ROOT = Path(__file__).parent
TABLE = ROOT / "tests" / "version_matrix.md"

HEAD = """\
# Versions that the suite was run on

Written by `nox` (`make matrix`), which replaces a session's row each time it runs it. *Quick* is the library's tests
and a part of the kernels' in Triton's interpreter; `nox -- full` runs everything. Counts are passed / failed / skipped.

"""
COLUMNS = ("session", "Python", "PyTorch", "Triton", "NumPy", "tests", "natively", "interpreter", "date", "revision")

TOOLS = ("pytest>=8", "pytest-benchmark>=5", "pytest-xdist", "hypothesis>=6.100", "einops>=0.8", "setuptools>=77")
TRAINING = ("scikit-learn>=1.5", "matplotlib>=3.8", "rich>=13")
ALL = ("build", "wheel", "timm>=1.0", "onnx", "onnxscript", "onnxruntime")

QUICK = (
    "tests/test_reference.py",
    "tests/test_native.py",
    "tests/test_native_parts.py",
    "tests/test_native_compiled.py",
    "tests/test_modules.py",
    "tests/test_modules_compiled.py",
    "tests/test_memory_formats.py",
    "tests/test_initialization.py",
    "tests/test_recomputation.py",
    "tests/test_precision.py",
    "tests/test_autocast.py",
    "tests/test_dispatch_modes.py",
    "tests/test_branch_norm.py",
    "tests/test_inference.py",
    "tests/test_weight_updates.py",
    "tests/test_convert.py",
    "tests/test_convert_refusals.py",
    "tests/test_convert_dense.py",
    "tests/test_fuse.py",
    "tests/test_fuse_parts.py",
    "tests/test_fuse_refusals.py",
    "tests/test_fused_networks.py",
    "tests/test_fuse_questions.py",
    "tests/test_summary.py",
    "tests/test_errors.py",
    "tests/test_explain.py",
    "tests/test_tuning.py",
    "tests/test_launching.py",
    "tests/test_overlap.py",
    "tests/test_traced_kernels.py",
    "tests/test_imports.py",
    "tests/test_reference_checkpoint.py",
    "tests/test_checkpoint.py",
    "tests/test_transforms.py",
    "tests/test_distributed.py",
)
QUICK_KERNELS = (
    "tests/kernels/test_branch.py",
    "tests/kernels/test_fusion.py",
    "tests/kernels/test_statistics.py",
    "tests/kernels/test_gate.py",
    "tests/kernels/test_layer.py",
    "tests/kernels/test_operators.py",
    "tests/kernels/test_reduction.py",
    "tests/kernels/test_backward_descriptor.py",
    "tests/kernels/test_epilogue.py",
)


class Versions(NamedTuple):
    """What a session installs; ``torchvision`` is the one of that PyTorch, None where none imports beside it."""

    python: str
    torch: str
    triton: str
    numpy: str
    torchvision: str | None


MATRIX = {
    "torch211-py310": Versions("3.10", "2.11.0", "3.6.0", "1.26.4", "0.26.0"),
    "torch211-py312": Versions("3.12", "2.11.0", "3.6.0", "2.3.5", "0.26.0"),
    "torch213-cpu-py311": Versions("3.11", "2.13.0+cpu", "3.7.1", "1.26.4", None),
    "torch213-py313": Versions("3.13", "2.13.0", "3.7.1", "2.3.5", "0.28.0"),
    "torch214-py310": Versions("3.10", "2.14.1", "3.8.0", "1.26.4", "0.29.1"),
    "torch214-py311": Versions("3.11", "2.14.1", "3.8.0", "2.4.6", "0.29.1"),
    "torch214-py313": Versions("3.13", "2.14.1", "3.8.0", "2.4.6", "0.29.1"),
}
"""Each release of PyTorch, Python and NumPy meets old and new ones of the others; Triton is what PyTorch asks for."""


def offer_every_python() -> None:
    """Let pyenv's ``python3.12`` start whatever version is the chosen one."""
    if pyenv := shutil.which("pyenv"):
        found = subprocess.run([pyenv, "versions", "--bare"], capture_output=True, text=True, check=False).stdout
        os.environ.setdefault("PYENV_VERSION", ":".join(reversed(found.split())))


offer_every_python()


@nox.session
@nox.parametrize("python,name", [nox.param(v.python, name, id=name) for name, v in MATRIX.items()])
def matrix(session: nox.Session, name: str) -> None:
    """The suite on one set of versions; ``-- full`` for all of it."""
    versions, full = MATRIX[name], session.posargs == ["full"]
    wanted = [f"torch=={versions.torch}", f"triton=={versions.triton}", f"numpy=={versions.numpy}"]
    if versions.torchvision:
        wanted.append(f"torchvision=={versions.torchvision}")
    session.install(*wanted, *TOOLS, *TRAINING, *(ALL if full else ()))
    session.install("--no-deps", "--no-build-isolation", "-e", ".")
    natively = tests(session, "natively", () if full else ("-m", "not slow", *QUICK))
    interpreter = tests(session, "interpreter", ("tests/kernels",) if full else QUICK_KERNELS, TRITON_INTERPRET="1")
    record(
        TABLE,
        {
            "session": name,
            **found_versions(session),
            "tests": "full" if full else "quick",
            "natively": str(natively),
            "interpreter": str(interpreter),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "revision": revision(),
        },
    )
    if natively.failed or interpreter.failed:
        session.error(f"{natively.failed} and {interpreter.failed} tests failed")


class Outcome(NamedTuple):
    """Numbers of tests; an error counts as a failure."""

    passed: int
    failed: int
    skipped: int

    def __str__(self) -> str:
        return " / ".join(map(str, self))


def tests(session: nox.Session, what: str, arguments: Sequence[str], **environment: str) -> Outcome:
    """Run pytest over the processors of this machine."""
    report = Path(session.create_tmp()) / f"{what}.xml"
    report.unlink(missing_ok=True)
    session.run(
        *("python", "-m", "pytest", "-n", "auto", f"--junitxml={report}", *arguments),
        env={"TRITON_INTERPRET": None, "OMP_NUM_THREADS": "1", **environment},
        success_codes=[0, 1],
    )
    return read_report(report)


def read_report(report: Path) -> Outcome:
    """The counts of a JUnit report as pytest writes it."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    return Outcome(total - failures - errors - skipped, failures + errors, skipped)


def found_versions(session: nox.Session) -> dict[str, str]:
    """What a session's environment really holds."""
    code = (
        "import json, platform, torch, triton, numpy; print(json.dumps({'Python': platform.python_version(),"
        "'PyTorch': torch.__version__, 'Triton': triton.__version__, 'NumPy': numpy.__version__}))"
    )
    return json.loads(str(session.run("python", "-c", code, silent=True)).splitlines()[-1])


def revision() -> str:
    """The commit that was tested, with a + where files differ from it."""
    git = ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def record(table: Path, row: dict[str, str]) -> None:
    """Put a row into a table, in place of the one of the same session."""
    rows = [*(old for old in read(table) if old["session"] != row["session"]), row]
    order = list(MATRIX)
    rows.sort(key=lambda old: order.index(old["session"]) if old["session"] in order else len(order))
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([one[column] for column in COLUMNS] for one in rows)]
    table.write_text(HEAD + "".join(f"| {' | '.join(line)} |\n" for line in lines))


def read(table: Path) -> list[dict[str, str]]:
    """The rows of a table that :func:`record` wrote; none where there is no file."""
    if not table.exists():
        return []
    lines = [line for line in table.read_text().splitlines() if line.startswith("|")][2:]
    return [dict(zip(COLUMNS, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines]
