"""The benchmarks run, and refuse to time a wrong result. Nothing here looks at a time."""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import RESNET50, Case
from fresh import run_python
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import allocator, competitors, dense_init, logits, overhead, products, ratios
from benchmarks.turns import fastest, turns
from spconv_triton import SPConv2d, convert, models
from spconv_triton.dispatch import HAS_TRITON, INTERPRETED

ROOT = Path(__file__).parents[1]

TINY = Case("tiny", 2, 8, 8, (6, 5))


FAULTS = """
import resource, sys
import torch
from benchmarks.allocator import settle

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(int(sys.argv[1]), dtype=torch.uint8).fill_(1)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20

unsettled = faults()
settle()
faults()
print(unsettled, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc keeps what it likes")
@pytest.mark.parametrize("megabytes", [40, 120])
def test_free_memory_stays_with_the_process(megabytes: int, tmp_path: Path) -> None:
    """Page faults of a call that allocates and frees: of every page, and after a few calls of nearly none."""
    printed = run_python(FAULTS, tmp_path, str(megabytes * 10**6), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    unsettled, settled = map(float, printed.split())
    assert unsettled > 10  # however large the pages are
    assert settled < unsettled / 10


def test_an_allocator_that_takes_no_options_is_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **kwargs: sizes.append(size) or empty(size, **kwargs))
    for libc in (object(), SimpleNamespace(mallopt=lambda *_: 0)):
        monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _name, libc=libc: libc)
        allocator.settle()
    assert len(sizes) == 2
    assert max(sizes) < allocator.LARGEST_LEARNT


@pytest.mark.parametrize("direction", competitors.DIRECTIONS)
@pytest.mark.parametrize("name", competitors.NAMES)
def test_competitors_are_ready_to_run(name: str, direction: str) -> None:
    competitor = competitors.build(TINY, name, direction)
    assert competitor.layout in competitors.LAYOUTS
    assert len(competitor.call()) == (1 if direction == "forward" else 3 if name == "conv2d" else 5)


def test_nobody_follows_the_same_neighbour_round_after_round() -> None:
    names = ("conv2d", "reference", "native")
    orders = list(turns(names, 60))
    assert orders == list(turns(names, 60)), "one run is like another"
    assert all(sorted(order) == sorted(names) for order in orders)
    line = [name for order in orders for name in order]
    for name in names:
        before = [line[i - 1] for i in range(1, len(line)) if line[i] == name]
        assert all(before.count(other) >= 12 for other in names if other != name)


def test_a_busy_machine_does_not_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes three times as long in a while that begins anywhere, the faster one is chosen."""

    class Clock:
        def __init__(self, busy_from: float) -> None:
            self.now, self.busy = 0.0, (busy_from, busy_from + 0.012)

        def call(self, milliseconds: float) -> None:
            self.now += milliseconds / 1e3 * (3 if self.busy[0] <= self.now < self.busy[1] else 1)

    for start in range(0, 40, 2):
        clock = Clock(start / 1e3)
        monkeypatch.setattr("benchmarks.turns.time.perf_counter", lambda clock=clock: clock.now)
        calls = {"slow": functools.partial(clock.call, 1.0), "fast": functools.partial(clock.call, 0.9)}
        assert fastest(calls) == "fast"


def test_macs_are_the_papers() -> None:
    """3.25 L M against 9 L M per output pixel; a training step counts three times."""
    for case in RESNET50:
        dense = competitors.count_macs(case, "conv2d", "forward")
        assert dense == 8 * case.size[0] ** 2 * 9 * case.in_channels**2
        assert 9 * competitors.count_macs(case, "native", "forward") == 3.25 * dense
        assert competitors.count_macs(case, "conv2d", "forward+backward") == 3 * dense


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that is off by a thousandth."""
    right = competitors.SPConv2d.forward

    def wrong(self: competitors.SPConv2d, x: torch.Tensor) -> torch.Tensor:
        return right(self, x) * 1.001

    monkeypatch.setattr(competitors.SPConv2d, "forward", wrong)
    with pytest.raises(AssertionError, match=r"tiny, native, channels_last: y: error .* against float64"):
        competitors.build(TINY, "native", "forward")


def _off_by_a_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every path but the reference, in any dtype: no judge that takes the same path would notice."""
    forward = SPConv2d.forward

    def wrong(self: SPConv2d, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) * (1 if self.backend == "reference" else 1.001)

    monkeypatch.setattr(SPConv2d, "forward", wrong)


def test_the_table_of_networks_is_of_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    resnet50 = pytest.importorskip("benchmarks.resnet50", reason="needs torchvision")
    images = torch.randn(2, 3, 16, 16)
    vanilla = logits.calibrated(models.resnet20(None), images)
    split = logits.calibrated(convert(copy.deepcopy(vanilla)), images).to(memory_format=torch.channels_last)
    head, _, *rows = resnet50.speeds(vanilla, split, images, 2, compiled=False)
    assert len(rows) == 5
    assert {row.count("|") for row in rows} == {head.count("|")}
    _off_by_a_thousandth(monkeypatch)
    with pytest.raises(AssertionError, match=r"SPConv: error .* against float64"):
        resnet50.speeds(vanilla, split, images, 2, compiled=False)


@pytest.mark.parametrize("way", [min, max])
def test_products_are_those_of_the_layer(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either way to multiply matrices: as many multiply-accumulates as the layer, and the gradients' shapes."""
    monkeypatch.setattr(products, "fastest", way)
    case = Case("uneven", 2, 8, 12, (6, 5))
    forward, step = (products.calls(case, direction) for direction in competitors.DIRECTIONS)
    with FlopCounterMode(display=False) as counter:
        products.run(forward)
    if way is min:  # the counter does not know oneDNN's, nor groups in a backward
        assert counter.get_total_flops() == 2 * competitors.count_macs(case, "native", "forward")
    results = products.run(step)
    y, of_pixels, dx3, dweight, dz, dpointwise = results
    assert y.shape == (2, 12, 6, 5)
    assert dx3.shape == (2, 4, 6, 5)
    assert dweight.shape == (12, 2, 3, 3)
    assert of_pixels.shape == (60, 12)
    assert dz.shape == (60, 8)
    assert dpointwise.shape == (12, 8)
    assert all(result.isfinite().all() for result in results)


def test_table_of_products(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(products, "RESNET50", (TINY,))
    monkeypatch.setattr(ratios, "SAMPLE_SECONDS", 0.0)
    products.main(["--rounds", "2", "--batches", "1"])
    head, _, *rows = (line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    assert len(rows) == 2 * len(competitors.DIRECTIONS)
    assert {row.count("|") for row in rows} == {head.count("|")}


def test_table_is_markdown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ratios, "RESNET50", (TINY,))
    monkeypatch.setattr(ratios, "SAMPLE_SECONDS", 0.0)
    ratios.main(["--rounds", "3", "--batches", "1", "2"])
    label, blank, head, rule, *rows = capsys.readouterr().out.splitlines()
    assert torch.__version__ in label
    assert blank == ""
    assert rule.replace("-", "") == "|" * head.count("|")
    assert [row.count("|") for row in rows] == [head.count("|")] * 8
    assert [row.split("|")[1].strip() for row in rows] == ["tiny"] * 4 + ["geometric mean"] * 4


def test_compiled_layers_are_set_beside_compiled_convolutions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def built(_case: Case, name: str, _direction: str) -> competitors.Competitor:
        return competitors.Competitor(name, lambda: None, "contiguous", 1)

    monkeypatch.setattr(ratios, "build", built)
    monkeypatch.setattr(ratios, "RESNET50", (TINY,))
    monkeypatch.setattr(ratios, "SAMPLE_SECONDS", 0.0)
    ratios.main(["--rounds", "2", "--batches", "1", "--compiled"])
    _, _, head, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.count("|") for row in rows] == [head.count("|")] * 4
    for row in rows[:2]:
        cells = dict(zip(map(str.strip, head.split("|")), map(str.strip, row.split("|")), strict=True))
        for name in ("conv2d compiled", "native compiled", ratios.BOTH_COMPILED):
            assert " to " in cells[f"{name} x"]
    seconds = {"conv2d": [6.0, 8.0], "conv2d compiled": [4.0, 4.0], "native compiled": [2.0, 1.0]}
    monkeypatch.setattr(ratios, "seconds_in_turns", lambda *_: seconds)
    milliseconds, found = ratios.measure(TINY, "forward", 2, ())
    assert milliseconds == 7000
    assert found[ratios.BOTH_COMPILED] == [2, 4]
    assert found["native compiled"] == [3, 8]


def test_a_compiled_convolution_is_a_dense_one() -> None:
    competitor = competitors.build(TINY, "conv2d compiled", "forward")
    assert competitor.macs == 2 * 8 * 8 * 9 * 30
    for direction in competitors.DIRECTIONS:
        compiled, eager = (competitors.count_macs(TINY, name, direction) for name in ("conv2d compiled", "conv2d"))
        assert compiled == eager > competitors.count_macs(TINY, "native compiled", direction)


def test_the_extra_has_what_benchmarks_import() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = {
        re.split("[^a-z0-9-]", line, maxsplit=1)[0]
        for line in (*project["dependencies"], *project["optional-dependencies"]["bench"])
    }
    imported: set[str] = {"sklearn"}  # by the library, for the digits
    for file in (ROOT / "benchmarks").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    ours = {"benchmarks", "spconv_triton", *(file.stem for file in (ROOT / "tests").glob("*.py"))}
    found = importlib.metadata.packages_distributions()
    others = {module: set(found.get(module, [module])) for module in imported - ours - sys.stdlib_module_names}
    assert not [module for module, names in others.items() if not names & listed], (others, listed)


@pytest.mark.parametrize(
    ("module", "option"),
    [
        *(("ratios", option) for option in ("--batches", "--threads")),
        *(("products", option) for option in ("--batches", "--threads")),
        *(("resnet50", option) for option in ("--batch", "--size", "--threads")),
        *(("dense_init", option) for option in ("--epochs", "--tuning", "--seeds", "--samples")),
        ("roofline", "--batches"),
        ("static", "--jobs"),
        ("comparison.__main__", "--threads"),
    ],
)
def test_a_count_of_nothing_is_refused(module: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = pytest.importorskip(f"benchmarks.{module}", reason="needs torchvision or triton")
    for value in ("0", "-1", "two"):
        with pytest.raises(SystemExit) as end:
            command.main([f"{option}={value}"])
        assert end.value.code == 2
        assert f"argument {option}: must be an integer of at least " in capsys.readouterr().err


def test_a_call_and_its_playback_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []
    monkeypatch.setattr(overhead, "record", lambda _call: [])
    monkeypatch.setattr(overhead, "seconds", lambda one: order.append(one) or len(order))
    called, played, _ = overhead.measure(call := lambda: None, 20)
    timed = order[2:]
    assert [i + 3 for i, one in enumerate(timed) if one is call] == called
    assert len(played) == 20
    first = [one is call for one in timed[::2]]
    assert 4 <= sum(first) <= 16


def test_resnet50_is_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a smaller network, for what it does with one."""
    networks = pytest.importorskip("torchvision.models", reason="the network is torchvision's")
    resnet50 = pytest.importorskip("benchmarks.resnet50", reason="needs torchvision")
    monkeypatch.setattr(networks, "resnet50", networks.resnet18)
    threads = torch.get_num_threads()
    resnet50.main(["--rounds", "2", "--batch", "2", "--size", "32", "--threads", "1"])
    torch.set_num_threads(threads)
    label, _, head, _, *rows, _, kept = capsys.readouterr().out.splitlines()
    assert torch.__version__ in label
    assert [row.count("|") for row in rows] == [head.count("|")] * 5
    assert [row.split("|")[1].strip() for row in rows[1:]] == [
        "vanilla, plain norms",
        "SPConv",
        "SPConv, fused",
        "SPConv, fused, plain norms",
    ]
    assert "MB vanilla" in kept


def test_layers_are_benchmarked_by_pytest() -> None:
    """Each file's smallest layer, checked and not timed."""
    smallest = (
        "benchmarks/test_layers.py::test_layer[resnet20, 3 x 3, 64 to 64, 8 x 8-1-forward-spconv]",
        "benchmarks/test_resnet50.py::test_layer[resnet50-512@7-1-forward-native]",
    )
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", *smallest]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


@pytest.mark.parametrize(("inputs", "outputs", "size"), list(overhead.CASES.values()), ids=list(overhead.CASES))
def test_the_kernels_of_a_call_are_recorded_without_its_views(inputs: int, outputs: int, size: int) -> None:
    layer, x = SPConv2d(inputs, outputs, 3, padding=1).eval(), torch.randn(1, inputs, size, size)
    with torch.inference_mode():
        kernels = overhead.record(lambda: layer(x.contiguous(memory_format=torch.channels_last)))
        names = [kernel.func.name() for kernel in kernels]
        assert sum(name in ("aten::conv2d", "mkldnn::_convolution_pointwise") for name in names) == 1
        products = [name for name in names if name.startswith(("aten::addmm", "aten::mm", "aten::baddbmm"))]
        assert len(products) == (3 if size == 7 else 1)  # the path of a layer that nobody watches
        assert not [name for name in names if name.startswith(("aten::permute", "aten::narrow", "aten::slice"))]
        for kernel in kernels:
            kernel()


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="kernels are compiled")
def test_host_is_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    host = importlib.import_module("benchmarks.host")
    monkeypatch.setattr(host, "CALLS", 1)
    monkeypatch.setattr(host, "CASES", host.CASES[:1])
    host.main(["--rounds", "2"])
    _, _, head, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.count("|") for row in rows] == [head.count("|")] * 3
    assert [row.split(" | ")[1:3] for row in rows] == [
        ["inference", "3"],
        ["forward", "3"],
        ["forward+backward", "7"],
    ]


def test_overhead_is_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(overhead, "CALLS", 1)
    threads = torch.get_num_threads()
    overhead.main(["--rounds", "2"])
    torch.set_num_threads(threads)
    label, _, imported, _, head, _, *rows = capsys.readouterr().out.splitlines()
    assert torch.__version__ in label
    assert imported.startswith("`import spconv_triton` after `import torch`: ")
    assert [row.count("|") for row in rows] == [head.count("|")] * len(overhead.CASES)


def test_dense_init(capsys: pytest.CaptureFixture[str]) -> None:
    """Its starting weights are those of ``convert``, and its tables have a row for each way of choosing them."""
    network = models.resnet20(in_channels=1)
    ours = dense_init.start(network, 0.25, dense_init.CORRELATION)
    theirs = convert(copy.deepcopy(network), 0.25, init="dense")
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    dense_init.main(["--epochs", "1", "--tuning", "1", "--seeds", "1", "--samples", "64"])
    _, _, _, *tables = capsys.readouterr().out.splitlines()
    rows = [row for row in tables if row]
    assert [row.split("|")[1].strip() for row in rows[2:6]] == list(dense_init.STARTS)
    assert [row.split("|")[1].strip() for row in rows[8:]] == list(dense_init.STARTS)
