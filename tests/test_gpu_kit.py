"""The GPU kit rehearsed: every section runs, whatever goes wrong is reported, and the rest goes on."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import competitors
from benchmarks.gpu import host, kit, layers, networks, plan, precompile
from benchmarks.gpu.device import Rehearsal
from benchmarks.gpu.markdown import kernels, markdown, tiles
from benchmarks.gpu.record import Record, read
from benchmarks.gpu.sections import SECTIONS, Section
from spconv_triton import models

ROOT = Path(__file__).parents[1]

# Sections that are rehearsed in one process, for each would import PyTorch anew, which takes longer than most of them;
# the rest are started by the command. Kernels run in the first two, and the first try configurations by chance.
TOGETHER = {
    "checks": ("graphs", "operators", "dynamo", "kernels"),
    "times": (
        *("layers", "single", "parts", "host", "variants", "single-variants", "memory", "networks", "others", "tiles"),
    ),
    "compiles": ("compile", "compile-tiles"),
}
ALONE = ("environment", "correctness", "model")

REHEARSED = """
import importlib, os
from benchmarks.gpu.sections import SECTIONS

def rehearse(record, names):
    for section in SECTIONS:
        if section.name in names:
            before = os.path.getsize(record._file.name)
            module, _, function = section.target.partition(":")
            getattr(importlib.import_module(module), function)(record)
            with record.check(f"{section.name}: tells something"):
                assert os.path.getsize(record._file.name) > before
"""

FAKES = """
import os, subprocess, sys, time

def environment(record):
    record.row("environment", name="device", value="Imagined GPU (80GB)")
    record.row("environment", name="date", value="2031-02-03T04:05:06+00:00")

def works(record):
    with record.check("arithmetic"):
        assert 1 + 1 == 2

def fails(record):
    with record.check("right"):
        pass
    with record.check("wrong"):
        raise AssertionError("off by one")
    with record.check("later"):
        pass

def loses_device(record):
    def alive():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    with record.check("poison", alive):
        raise AssertionError("nonsense")
    record.note("never reached")

def crashes(record):
    record.note("about to")
    os.abort()

def hangs(record):
    with record.check("before"):
        pass
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    record.note(str(child.pid))
    time.sleep(600)

def skips(record):
    record.skip("nothing to do")

def looks(record):
    record.row("seen", files=sorted(os.listdir(os.environ["LOOK_AT"])))

def breaks(record):
    sys.exit("there is no such device")

def meets(record):
    # Passes only if another of its kind runs at the same time.
    mine = record._file.name
    folder = os.environ["MEET_AT"]
    open(os.path.join(folder, os.path.basename(mine)), "w").close()
    with record.check("not alone"):
        for _ in range(600):
            if len(os.listdir(folder)) == 2:
                return
            time.sleep(0.05)
        raise AssertionError("alone")

def caches(record):
    from pathlib import Path
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    record.row("cache", found=sorted(path.name for path in folder.iterdir()))
    (folder / "kernel").touch()
"""


class Rehearsed(NamedTuple):
    """Exit status, and what was written of it as JSON and as Markdown."""

    status: int
    report: str
    text: str


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> list[Rehearsed]:
    """What ``make gpu DRY=1`` does of some sections, and the others in fewer processes."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--minutes", "20", "--out", str(out), "--only", *ALONE]
    by_command = subprocess.Popen(command, cwd=ROOT)
    modules = tmp_path_factory.mktemp("modules")
    code = [f"def {name}(record):\n    rehearse(record, {names})\n" for name, names in TOGETHER.items()]
    (modules / "rehearsed.py").write_text("\n".join((REHEARSED, *code)))
    options: dict[str, dict[str, bool]] = {"checks": {}, "times": {"tunes": True}, "compiles": {"interpreted": False}}
    sections = [Section(name, name, f"rehearsed:{name}", 120, **given) for name, given in options.items()]
    together = tmp_path_factory.mktemp("together")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(modules))
        statuses = [kit.main(["--dry", "--minutes", "20", "--out", str(together)], sections), by_command.wait()]
    return [
        Rehearsed(status, *(next(folder.glob(f"gpu-rehearsal-*.{kind}")).read_text() for kind in ("json", "md")))
        for status, folder in zip(statuses, (together, out), strict=True)
    ]


def test_every_section_is_rehearsed() -> None:
    sections = {section.name: section for section in SECTIONS}
    assert sections.keys() == {*ALONE, *itertools.chain(*TOGETHER.values())}
    kinds = {group: {(sections[n].interpreted, sections[n].tunes) for n in names} for group, names in TOGETHER.items()}
    assert kinds == {"checks": {(True, False)}, "times": {(True, True)}, "compiles": {(False, False)}}


def test_a_rehearsal_finds_nothing_wrong(rehearsal: list[Rehearsed]) -> None:
    for status, written, text in rehearsal:
        for section in json.loads(written)["sections"]:
            assert section["status"] == "passed", section
            assert section["rows"] or section["checks"] or section["notes"], section["name"]
        assert status == 0
        assert "A rehearsal, not a measurement" in text
        assert "measured" not in text.partition("## Outcome")[2]
    assert str(torch.__version__) in rehearsal[-1].text


def found(rehearsal: list[Rehearsed], kind: str) -> list[Any]:
    """``"rows"``, ``"checks"`` or ``"notes"`` of all sections."""
    return [line for part in rehearsal for section in json.loads(part.report)["sections"] for line in section[kind]]


def test_a_rehearsal_comes_to_every_table(rehearsal: list[Rehearsed]) -> None:
    rows = found(rehearsal, "rows")
    times = {(row["direction"], row["what"], row["competitor"]) for row in rows if row["row"] == "times"}
    names = (*plan.FEW, *plan.COMPILED, "separate", "flat")
    assert {(d, "device", n) for d in ("forward", "backward", "step") for n in names} <= times
    assert {("step", "called", n) for n in ("vanilla", "SPConv 1/2", "SPConv 1/2, branch norms")} <= times
    assert {("forward+backward", "called", name) for name in plan.FEW} <= times
    tables = {row["row"] for row in rows}
    assert {"environment", "ceilings", "times", "memory", "network memory", "model", "host"} <= tables
    for row in (row for row in rows if row["row"] == "host"):
        assert row["us"] > 0
        own = [function["us"] for function in row["functions"]]
        assert own == sorted(own, reverse=True)
        called = {function["function"] for function in row["functions"]}
        assert any("conv2d" in name if row["competitor"] == "conv2d" else ".py:" in name for name in called), called
    assert any(note.startswith("needs a GPU") for note in found(rehearsal, "notes"))


def test_operators_are_all_found(rehearsal: list[Rehearsed]) -> None:
    assert {check["check"] for check in found(rehearsal, "checks")} >= {
        *("spconv2d", "spconv2d_backward", "spconv2d_inference", "onepass_descriptor", "representative_branch"),
        *("weight_grad_descriptor", "input_grad_descriptor", "gap_softmax_fusion", "gap_softmax_fusion_backward"),
    }


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a report of sections that do what their names say."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "fakes.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setenv("LOOK_AT", str(tmp_path / "out"))
    monkeypatch.delenv("OUT", raising=False)
    return tmp_path / "out"


def fake(name: str, seconds: int = 60, **options: bool) -> Section:
    return Section(name, name.capitalize(), f"fakes:{name}", seconds, **options)


ENVIRONMENT = fake("environment", essential=True)


def run(out: Path, *sections: Section, options: tuple[str, ...] = ()) -> tuple[int, dict[str, Any], str]:
    """Exit status and report."""
    status = kit.main(["--out", str(out), *options], sections)
    (path,) = out.glob("*.json")
    return status, json.loads(path.read_text()), path.with_suffix(".md").read_text()


def test_what_goes_wrong_is_reported_and_the_rest_goes_on(fakes: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = ("works", "fails", "loses_device", "crashes", "skips", "looks")
    status, report, text = run(fakes, ENVIRONMENT, *map(fake, names))
    assert status == 1
    found = {section["name"]: section for section in report["sections"]}
    assert [s["status"] for s in found.values()] == [
        "passed",
        "passed",
        "failed",
        "crashed",
        "crashed",
        "skipped",
        "passed",
    ]
    assert [check["passed"] for check in found["fails"]["checks"]] == [True, False, True]
    assert found["loses_device"]["notes"] == []
    assert "illegal memory access" in "\n".join(found["loses_device"]["output"])
    assert found["crashes"]["notes"] == ["about to"]
    assert found["skips"]["reason"] == "nothing to do"
    assert report["command"] == "python -m benchmarks.gpu --out DIR", "a report names no folder of the machine"
    name = "gpu-imagined-gpu-80gb-2031-02-03"
    assert found["looks"]["rows"][0]["files"] == [f"{name}.json", f"{name}.md"], "saved after every section, and whole"
    assert sorted(path.name for path in fakes.iterdir()) == [f"{name}.json", f"{name}.md"]
    assert "**fails: wrong**" in text
    assert "illegal memory access" in text, "what a section says that did not come to its end"
    assert "    off by one" in text
    printed = capfd.readouterr().out
    assert "FAILED fails: wrong: off by one" in printed


def test_tiles_of_a_section_that_ended_before_the_chosen_one() -> None:
    """Each is compared with the chosen one, in parts, so that one stands in several."""
    row = {"layer": "64@56", "batch": 8, "kernel": "forward", "tile": "a", "us": 2.0, "speed": 1.0, "chosen": True}
    rows = [row, {**row, "tile": "b", "us": 1.0, "speed": 2.0, "chosen": False}, row]
    (line,) = (line for line in tiles(rows, "measured") if "64@56" in line)
    assert line.split("|")[-2].strip() == "2"
    unfinished = [{**row, "us": None, "speed": None, "chosen": False}]
    assert not any("64@56" in line for line in tiles(unfinished, "measured"))


def test_a_section_that_hangs_is_ended_with_all_it_started(fakes: Path) -> None:
    status, report, _ = run(fakes, fake("hangs", 4), fake("works"))
    hung, worked = report["sections"]
    assert (status, hung["status"], worked["status"]) == (1, "timed out", "passed")
    assert [check["check"] for check in hung["checks"]] == ["before"]
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it is gone, or a zombie
        assert Path(f"/proc/{hung['notes'][0]}/stat").read_text().split()[2] == "Z"


def test_checks_run_side_by_side(fakes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "met").mkdir()
    monkeypatch.setenv("MEET_AT", str(tmp_path / "met"))
    both = [Section(name, name, "fakes:meets", 60, beside=True) for name in ("one", "other")]
    status, report, _ = run(fakes, fake("works"), *both, fake("skips"))
    assert status == 0
    assert [section["name"] for section in report["sections"]] == ["works", "one", "other", "skips"]


@pytest.mark.parametrize("given", [True, False])
def test_a_cache_that_is_given_is_kept(fakes: Path, tmp_path: Path, given: bool) -> None:
    options = ("--cache", str(tmp_path / "cache")) if given else ()
    found = []
    for number in range(2):
        _, report, _ = run(fakes / str(number), fake("caches"), options=options)
        found.append(report["sections"][0]["rows"][0]["found"])
    assert found == ([[], ["kernel"]] if given else [[], []])


def test_untuned_kernels_take_configurations_by_chance() -> None:
    code = (
        "import triton; from triton.runtime import Autotuner; from benchmarks.gpu import untuned; untuned.take();"
        "times = [Autotuner._bench(None, config=None) for _ in range(9)];"
        "assert len(set(map(tuple, times))) == 9, times"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_kernels_are_compiled_for_a_gpu_that_is_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into the two caches in which the kit looks for them."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "anywhere")  # and what is set is undone
    monkeypatch.setattr(precompile, "compiled", one_by_one)
    few = itertools.islice(precompile.jobs((9, 0)), 1)
    monkeypatch.setattr(precompile, "jobs", lambda _: few)
    assert precompile.main([str(tmp_path)]) == 0
    kernels = list((tmp_path / "small").rglob("*.cubin"))
    assert f"{len(kernels)} of " in capsys.readouterr().out
    assert any(path.stem == "window_statistics" for path in kernels)


def one_by_one(tasks: list[precompile.Task], target: str, _: int | None) -> Iterator[str]:
    """In this process, and no more than two: all of them take minutes."""
    del tasks[2:]
    return (precompile._compile(target, task) for task in tasks)


@pytest.mark.parametrize("capability", ["9", "7.5", "nine"])
def test_an_unknown_capability_is_refused(capability: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        precompile.main(["anywhere", "--capability", capability])
    assert status.value.code == 2
    assert f"--capability must be one of 8.0, 9.0, 10.0, 12.0, got {capability}" in capsys.readouterr().err


def test_after_the_deadline_sections_are_skipped_and_listed(fakes: Path) -> None:
    status, report, text = run(fakes, fake("hangs"), fake("works"), options=("--minutes", "0.1"))
    assert status == 1
    assert [section["status"] for section in report["sections"]] == ["timed out", "skipped"]
    assert "skipped: no time left" in text


def test_nothing_but_skipped_sections_is_no_failure(fakes: Path) -> None:
    status, report, _ = run(fakes, ENVIRONMENT, fake("fails"), options=("--minutes", "0"))
    assert status == 0
    assert {section["status"] for section in report["sections"]} == {"skipped"}


def test_only_some_sections(fakes: Path) -> None:
    status, report, _ = run(fakes, ENVIRONMENT, fake("fails"), fake("works"), options=("--only", "works"))
    assert status == 0
    assert [section["name"] for section in report["sections"]] == ["environment", "works"]


def test_a_report_is_not_written_over(fakes: Path) -> None:
    for _ in range(2):
        assert kit.main(["--out", str(fakes)], [ENVIRONMENT]) == 0
    assert len(list(fakes.glob("gpu-imagined-gpu-80gb-2031-02-03*"))) == 4


def test_without_a_device_nothing_is_written(fakes: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert kit.main(["--out", str(fakes)], [fake("breaks", essential=True), fake("works")]) == 2
    assert capfd.readouterr().err == "breaks: there is no such device\n"
    assert list(fakes.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "environment: there is no CUDA device; DRY=1 (--dry) rehearses the kit without one\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_bad_folder_is_refused_before_anything_runs(
    fakes: Path, place: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as exit_status:
        kit.main(["--out", str(tmp_path / place)], [fake("works")])
    assert exit_status.value.code == 2
    message = capfd.readouterr()
    assert message.out == ""
    assert message.err.count("\n") == 1
    assert "--out must be a folder that can be written to" in message.err
    assert (tmp_path / "file").read_text() == "mine"
    assert not fakes.exists()


def test_folder_from_the_environment(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(fakes))
    assert kit.main([], [ENVIRONMENT]) == 0
    assert len(list(fakes.iterdir())) == 2


def test_what_runs_the_sections_imports_no_torch() -> None:
    code = "import sys, benchmarks.gpu.kit, benchmarks.gpu.child; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_wrong_result_is_reported_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = competitors.SPConv2d.forward

    def wrong(layer: competitors.SPConv2d, x: torch.Tensor) -> torch.Tensor:
        return right(layer, x) * (1.001 if layer.backend == "native" else 1)

    monkeypatch.setattr(competitors.SPConv2d, "forward", wrong)
    entry = plan.Entry(plan.TINY, torch.float32, ("conv2d", "reference", "native"))
    sampler = Rehearsal().sample
    with Record(tmp_path / "record", rehearsal=True) as record:
        field = layers.contestants(record, Rehearsal(), entry)
        layers.report(
            record, layers.keys(entry), "forward", "device", layers.fastest(field, "forward", sampler), sampler
        )
    assert {contestant.name for contestant in field} == {"conv2d", "reference"}
    (failed,) = (line for line in read(tmp_path / "record") if not line.get("passed", True))
    assert "against float64" in failed["message"]
    assert record.failures == 1


def test_a_wrong_network_is_reported_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one without branch norms, whose layers are off by a tenth."""
    right = competitors.SPConv2d.forward

    def wrong(layer: competitors.SPConv2d, x: torch.Tensor) -> torch.Tensor:
        return right(layer, x) * (1 if layer.branch_norm or layer.backend == "reference" else 1.1)

    monkeypatch.setattr(competitors.SPConv2d, "forward", wrong)
    small = functools.partial(models.VGG, (2,), (4,), 3, 10)
    monkeypatch.setattr(
        networks,
        "_network",
        lambda record, alpha, branch_norm=False: small(models.SPConvOptions(alpha, 2, branch_norm, "native")),
    )
    with Record(tmp_path / "record", rehearsal=True) as record:
        networks.networks(record)
    lines = read(tmp_path / "record")
    (failed,) = (line for line in lines if not line.get("passed", True))
    assert failed["check"].startswith("SPConv 1/2: logits")
    timed = {line["competitor"] for line in lines if line.get("row") == "times"}
    assert timed == {"vanilla", "SPConv 1/2, branch norms"}


def test_markdown_sets_what_was_measured_beside_what_is_modelled() -> None:
    keys = {"layer": "a", "batch": 32, "dtype": "float16", "direction": "step"}
    times = [
        {"row": "times", **keys, "what": "device", "competitor": name, "yardstick": "conv2d", "ms": ms, "speed": speed}
        for name, ms, speed in (("conv2d", [2.0, 3.0, 4.0], [1, 1, 1]), ("triton", [1.0, 1.5, 2.0], [1.5, 2.0, 2.5]))
    ]
    model = [
        {"row": "model", **keys, "direction": direction, "path": path, "ms": ms}
        for path, ms in (("conv2d", 0.5), ("onepass", 0.125))
        for direction in ("forward", "backward")
    ]
    section = {"name": "s", "title": "S", "status": "passed", "seconds": 1.0, "checks": [], "rows": times + model}
    text = markdown({"rehearsal": False, "command": "kit", "sections": [section]})
    head = "| | N | conv2d ms, measured | triton ms, measured | conv2d ms, modelled | triton ms, modelled |"
    assert head.replace("| |", "|  |") in text
    assert "| a | 32 | 3 | 1.5 | 1 | 0.25 |" in text
    assert "| a | 32 | 2.00 (1.50 to 2.50) | 4 |" in text
    assert "rehears" not in text


def test_markdown_tells_when_kernels_begin() -> None:
    """The second before the first has ended, the third after the second."""
    call = {"row": "parts", "layer": "a", "batch": 1, "direction": "forward", "competitor": "triton"}
    launches = (("statistics", 5.0, 0.0), ("gate", 4.0, 3.0), ("convolve", 10.0, 8.5))
    rows = [{**call, "number": i, "kernel": k, "us": us, "at": at} for i, (k, us, at) in enumerate(launches)]
    assert kernels(rows, "measured")[-1] == (
        "| a | 1 | forward | triton | 19 | 18.5 | statistics 5 at 0, gate 4 at 3, convolve 10 at 8.5 |"
    )


def test_a_call_is_told_by_its_functions() -> None:
    """Built-in ones too, by their own time, and not what calls them."""

    def slow() -> None:
        time.sleep(0.01)

    found = host.own_times(Rehearsal(), slow, 3)
    assert found[0]["function"] == "time.sleep"
    assert found[0]["calls"] == 1
    assert found[0]["us"] > 9e3
    assert {"test_gpu_kit.py:slow"} <= {entry["function"] for entry in found[1:]}
    assert host.until_it_returns(Rehearsal(), slow, 3) > 9e-3
