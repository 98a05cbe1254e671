"""The comparison of SPConv with its peers runs, and refuses to time a wrong result. Nothing here looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from benchmarks.comparison import __main__ as comparison
from benchmarks.comparison import accuracy, compare, layers, networks, pictures, plan, subjects, tables
from benchmarks.comparison.in_short import PAGE, in_short
from benchmarks.comparison.memory import peak_bytes
from benchmarks.comparison.page import write_page
from benchmarks.comparison.rounds import Effort, take_turns
from benchmarks.competitors import DIRECTIONS
from benchmarks.peers import NAMES, NETWORKS, HetConv
from benchmarks.peers.catalogue import COMPILED, VARIANTS
from spconv_triton import SPConv2d

ONCE = Effort(0, fewest=2, most=2, sample=0)
SMALLEST = layers.shapes("resnet20")[-1]


def cell(direction: str, dtype: torch.dtype = torch.float32) -> layers.Cell:
    return layers.Cell("resnet20", replace(SMALLEST, batch=3), direction, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_layer_is_found_right(direction: str, dtype: torch.dtype) -> None:
    rows = layers.measure(cell(direction, dtype), ONCE)
    left_out = COMPILED if direction == DIRECTIONS[1] else VARIANTS
    assert [row["name"] for row in rows] == [name for name in NAMES if not name.endswith(left_out)]
    for row in rows:
        assert "error" not in row, row
        assert row["speed"][1] > 0
        assert row["peak_bytes"] > 0
        assert ("kept_bytes" in row) == (direction == DIRECTIONS[1])
    macs = {row["name"]: row["macs"] / rows[0]["macs"] for row in rows}
    assert macs["spconv"] == macs["reference"] == 3.25 / 9
    assert macs["hetconv-p4"] == 1 / 3
    assert macs["shuffle"] == 1 / 4


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    """A layer that is off by a thousandth."""
    right = HetConv.forward

    def wrong(self: HetConv, x: Tensor) -> Tensor:
        return right(self, x) * (1 if x.dtype == torch.float64 else 1.001)

    monkeypatch.setattr(HetConv, "forward", wrong)
    rows = {row["name"]: row for row in layers.measure(cell(direction), ONCE)}
    for name in ("hetconv-p4", "hetconv-p8"):
        assert "float64" in rows[name]["error"]
        assert "seconds" not in rows[name]
    assert "seconds" in rows["conv2d"]


def test_networks_are_deployed_as_far_as_norms_fold() -> None:
    """Behind a sum, a shuffle or a concatenation they stay, and the table says how many of them."""
    built = networks.Networks("resnet20", 16)
    rows = {row["name"]: row for row in built.measure(networks.Load("resnet20", 2), ONCE)}
    assert not [row for row in rows.values() if "error" in row]
    stay = {name: (row["norms_left"], row["norms"]) for name, row in rows.items() if "norms" in row}
    assert stay == {
        "conv2d deployed": (1, 21),
        "spconv deployed": (1, 57),
        "reference deployed": (1, 57),
        "ghost deployed": (37, 39),
        "hetconv-p4 deployed": (19, 21),
        "hetconv-p8 deployed": (19, 21),
        "separable deployed": (1, 39),
        "shuffle deployed": (19, 21),
        "pconv deployed": (1, 21),
    }
    table = "\n".join(tables.networks(list(rows.values()), built.sizes(), "resnet20"))
    assert "| HetConv, P 4, deployed (19 of 21 norms stay) |" in table


def test_a_wrong_network_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer that is off by a thousandth in any dtype, unless it is the reference."""
    monkeypatch.setattr(networks, "NAMES", ("conv2d", "spconv", "reference"))
    built = networks.Networks("resnet20", 16)
    forward = SPConv2d.forward

    def wrong(self: SPConv2d, x: Tensor) -> Tensor:
        return forward(self, x) * (1 if self.backend == "reference" else 1.001)

    monkeypatch.setattr(SPConv2d, "forward", wrong)
    for step, deployed in ((False, 3), (True, 0)):
        rows = built.measure(networks.Load("resnet20", 2, step), ONCE)
        assert {row["name"] for row in rows if "error" in row} == {"spconv"}
        assert len(rows) == 3 + deployed


def test_what_times_revisions_needs_no_torchvision() -> None:
    code = "import sys, benchmarks.comparison.plan; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=compare.ROOT, check=False).returncode == 0


def test_weights_gradients_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subjects.find_best(cell(DIRECTIONS[1]).case, "spconv", DIRECTIONS[1], torch.float32)
    subjects.check(subject, DIRECTIONS[1])
    right = subjects.Subject.gradients

    def wrong(self: subjects.Subject, grads: object) -> tuple[Tensor, ...]:
        results = right(self, grads)
        return (*results[:-1], results[-1] * (1.001 if results[-1].dtype == torch.float32 else 1))

    monkeypatch.setattr(subjects.Subject, "gradients", wrong)
    with pytest.raises(AssertionError, match=r"spconv, .*, forward\+backward: result 4: error"):
        subjects.check(subject, DIRECTIONS[1])


def test_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    taken = take_turns(calls, Effort(0, fewest=3, most=9, sample=0))
    assert {name: len(seconds) for name, seconds in taken.items()} == dict.fromkeys("abc", 3)
    timed = order[-9:]
    assert [sorted(timed[i : i + 3]) for i in (0, 3, 6)] == [["a", "b", "c"]] * 3


def test_peak_is_of_what_is_alive_at_a_time() -> None:
    def work() -> None:
        first = torch.ones(1000, dtype=torch.float64)
        second = first.neg()
        del first
        second.neg()

    assert peak_bytes(work) == 16000


def test_pareto_front() -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 7.0), (3.0, 7.0), (4.0, 8.0)]
    assert pictures.pareto(points[::-1]) == [(1.0, 5.0), (2.0, 7.0), (4.0, 8.0)]


@pytest.mark.parametrize(
    ("times", "noise", "slower"),
    [(1.0, 0.0, False), (1.1, 0.0, True), (1.1, 0.2, False), (1.01, 0.0, False), (0.8, 0.0, False)],
)
def test_what_counts_as_slower(times: float, noise: float, slower: bool) -> None:
    """SPConv takes ``times`` as long; nn.Conv2d is off by ``noise`` in every other round."""
    base = [{"conv2d": 1.0, "spconv": 1.0}] * 10
    here = [{"conv2d": 1 + noise * (i % 2), "spconv": times} for i in range(10)]
    verdict = compare.judge(base, here)
    assert verdict.slower is slower
    assert verdict.ratio[1] == pytest.approx(1 / times)


def test_who_is_faster_with_as_many_products() -> None:
    times = {"conv2d": (9, 1.0), "spconv": (3, 0.5), "reference": (3, 0.4), "pconv": (1, 0.1), "ghost": (4, 0.6)}
    head = {"network": "vgg16", "layer": "3 x 3", "batch": 1, "dtype": "float32", "direction": "forward"}
    rows = [{**head, "name": name, "macs": macs, "speed": [0, 1 / s, 99]} for name, (macs, s) in times.items()]
    (line,) = tables.beaten(rows)
    assert line == "- vgg16, 3 x 3, N = 1, float32, forward: SPConv reference, eager (1.25 x)"
    assert not tables.beaten([row for row in rows if row["name"] != "reference"])


def test_float32_is_not_timed_as_tf32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, arguments in ((comparison, ["--out", str(tmp_path)]), (compare, ["HEAD"])):
        monkeypatch.setattr(module, "DEVICE", "cuda")
        with pytest.raises(SystemExit):
            module.main(arguments)
        assert "float32 would be TF32 on a GPU" in capsys.readouterr().err


def test_plans_cover_what_they_promise() -> None:
    full = plan.full()
    assert {(c.network, c.case.batch, c.direction, c.dtype) for c in full.cells} == {
        (network, batch, direction, dtype)
        for network in NETWORKS
        for batch in (1, 8, 64)
        for direction in DIRECTIONS
        for dtype in (torch.float32, torch.bfloat16)
    }
    for made in (full, plan.quick()):
        compiled = {tables.stage({"network": c.network, "layer": c.case.name}) for c in made.cells if c.compiled}
        assert compiled == {"64@56", "128@28", "256@14", "512@7"}
        assert {load.network for load in made.loads} == set(NETWORKS)
        for one in (*made.cells, *made.loads):
            assert "spconv" not in one.compiled or "conv2d" in one.compiled
        assert all(effort.sample > 0 for effort in (made.layer, made.network, made.latency))
    assert full.seeds == 5
    assert full.at_most(3).layer.most == 3


def fake_results() -> dict[str, Any]:
    """Two layers of each network, in which SPConv is 2 and 3 times as fast, twice compiled, and Ghost 2.5 times."""
    speeds = {"conv2d": (1, 1), "conv2d compiled": (1.1, 1.2), "spconv": (2, 3), "spconv compiled": (4, 6)}
    speeds["ghost"] = (2.5, 2.5)
    rows = []
    for network in ("resnet50", "vgg16"):
        for i, layer in enumerate(("3 x 3, 64 to 64, 56 x 56", "3 x 3, 128 to 128, 28 x 28")):
            head = {"network": network, "layer": layer, "batch": 8, "dtype": "float32", "direction": "forward"}
            for name, own in speeds.items():
                times = {"seconds": [1.0 / own[i]] * 3, "speed": [own[i] - 0.1, own[i], 9.0], "rounds": 5 + i}
                rows.append({**head, "name": name, "macs": 9 if name.startswith("conv2d") else 3, **times})
    return {"plan": "fake", "command": "nothing", "minutes": 1.0, "date": "today", "machine": "none", "layers": rows}


def test_the_page_says_what_it_comes_to(tmp_path: Path) -> None:
    text = write_page(fake_results(), tmp_path).read_text()
    for line in (
        "| resnet50 | forward | SPConv, alpha 1/2 | 2.00 to 3.00 |",
        "| vgg16 | forward | SPConv, alpha 1/2, compiled | 4.00 to 6.00 |",
        "| vgg16 | forward | nn.Conv2d, compiled | 1.10 to 1.20 |",
        "| nn.Conv2d |  | 0 of 4 |  |",
        "| Ghost module, s 2 |  | 2 of 4 |  |",
    ):
        assert f"\n{line}\n" in text
    assert "Rounds: 5 to 6 for a layer." in text
    _, _, rest = text.partition("\n## In short\n\n")
    assert rest.startswith("\n".join(in_short(text)) + "\n\n## Layers\n"), "the page with these lines gives others"


def test_the_readme_is_of_the_page() -> None:
    lines = in_short(PAGE.read_text())
    assert len(lines) > 20
    missing = "README.md has not what python -m benchmarks.comparison.in_short prints"
    assert "\n".join(lines) in (compare.ROOT / "README.md").read_text(), missing


@pytest.mark.slow
def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("conv2d", "spconv", "ghost")
    monkeypatch.setattr(accuracy, "CANDIDATES", {name: accuracy.CANDIDATES[name] for name in few})
    monkeypatch.setattr(networks, "NAMES", (*few, "reference"))
    rehearsed = plan.rehearsal()
    monkeypatch.setitem(comparison.PLANS, "rehearsal", lambda: replace(rehearsed, cells=rehearsed.cells[:3]))
    results = tmp_path / "runs" / "results.json"
    options = ["--mode", "rehearsal", "--threads", "1", "--out", str(tmp_path), "--results", str(results)]
    assert comparison.main(options) == 0
    page = (tmp_path / "REPORT.md").read_text()
    for title in ("In short", "Layers", "Networks", "Accuracy at equal budget", "How it is measured"):
        assert f"\n## {title}\n" in page
    assert torch.__version__ in page
    for block in page.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block
    drawn = [line.partition("](")[2].rstrip(")") for line in page.splitlines() if line.startswith("![")]
    assert len(drawn) == 3
    for name in drawn:
        text = " ".join(ElementTree.parse(tmp_path / name).getroot().itertext())
        assert "nn.Conv2d" in text
        assert "speed (nn.Conv2d = 1)" in text or "test accuracy (%)" in text
    before = {name: (tmp_path / name).read_bytes() for name in drawn}
    found = json.loads(results.read_text())
    found["networks"][0] = {**found["networks"][1], "name": "ghost", "error": "error 1e-3 against float64"}
    results.write_text(json.dumps(found))
    assert comparison.main([*options, "--page"]) == 1
    assert "## Not timed" in (tmp_path / "REPORT.md").read_text()
    assert {name: (tmp_path / name).read_bytes() for name in drawn} == before


@pytest.mark.slow
@pytest.mark.skipif(not (compare.ROOT / ".git").exists(), reason="needs the repository's history")
def test_two_revisions(capsys: pytest.CaptureFixture[str]) -> None:
    """HEAD and the working tree, which no test expects to be equally fast: it runs, and leaves no worktree behind."""
    before = _worktrees()
    assert compare.main(["HEAD", "--rehearse", "--threads", "1"]) in (0, 1)
    assert _worktrees() == before
    printed = capsys.readouterr().out
    assert printed.count("\n| resnet") == len(plan.rehearsal().cells)
    assert compare.main(["no-such-revision"]) == 2
    assert "no-such-revision" in capsys.readouterr().err
    assert _worktrees() == before


def _worktrees() -> list[str]:
    """The folders of the repository's worktrees that are this test's: others may come and go meanwhile."""
    command = ["git", "-C", str(compare.ROOT), "worktree", "list", "--porcelain"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if line.startswith("worktree ") and compare.PREFIX in line]
