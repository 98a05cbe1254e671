"""The version matrix: what its sessions install is legal, and their table keeps a row for each."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]

pytest.importorskip("nox")

REPORT = """<?xml version="1.0"?>
<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10">
<testcase name="a"/></testsuite></testsuites>
"""


@pytest.fixture
def noxfile(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("PYENV_VERSION", "system")  # importing it would set this for good
    return importlib.import_module("noxfile")


def row(session: str, natively: str = "5 / 0 / 1") -> dict[str, str]:
    versions = {"Python": "3.12.1", "PyTorch": "2.13.0+cpu", "Triton": "3.7.1", "NumPy": "2.3.5"}
    outcome = {"tests": "quick", "natively": natively, "interpreter": "7 / 0 / 0"}
    return {"session": session, **versions, **outcome, "date": "2031-02-03", "revision": "0123456789+"}


def test_a_row_replaces_that_of_its_session(tmp_path: Path, noxfile: ModuleType) -> None:
    table = tmp_path / "table.md"
    assert noxfile.read(table) == []
    first, second = list(noxfile.MATRIX)[:2]
    for written in (row("retired"), row(second), row(first), row(second, "4 / 1 / 1")):
        noxfile.record(table, written)
    assert noxfile.read(table) == [row(first), row(second, "4 / 1 / 1"), row("retired")]


def test_counts_are_read_from_a_report(tmp_path: Path, noxfile: ModuleType) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    assert str(noxfile.read_report(tmp_path / "report.xml")) == "4 / 3 / 3"


def test_files_of_the_quick_selection_exist(noxfile: ModuleType) -> None:
    assert [file for file in (*noxfile.QUICK, *noxfile.QUICK_KERNELS) if not (ROOT / file).is_file()] == []


def test_the_pinned_versions_are_in_the_matrix(noxfile: ModuleType) -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pinned = tuple(pins[name] for name in ("torch", "triton", "numpy", "torchvision"))
    assert pinned in {versions[1:] for versions in noxfile.MATRIX.values()}


def test_the_table_is_of_this_matrix(noxfile: ModuleType) -> None:
    """Every row was written by a session that still exists, for the versions it still has, and none has failures."""
    for one in noxfile.read(noxfile.TABLE):
        versions = noxfile.MATRIX[one["session"]]
        assert one["Python"].startswith(f"{versions.python}."), one
        assert one["PyTorch"].split("+")[0] == versions.torch.split("+")[0], one
        assert (one["Triton"], one["NumPy"]) == (versions.triton, versions.numpy), one
        for outcome in (one["natively"], one["interpreter"]):
            passed, failed, _ = map(int, outcome.split("/"))
            assert passed > 0, one
            assert failed == 0, one
