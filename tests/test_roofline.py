"""The roofline model against published counts, against bounds that any model keeps, and its committed results."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import RESNET50, Case
from torch import nn

from benchmarks import floors, roofline
from benchmarks.floors import DEVICES, DIRECTIONS, PATHS, chosen, floor_seconds, footprint, steps, useful_flops
from benchmarks.networks import IMAGES, Convolution, convolutions
from benchmarks.roofline_picture import draw
from benchmarks.tally import Traffic
from spconv_triton import models
from spconv_triton.training.measure import count_macs

STALE = "is not what the code gives now: run python -m benchmarks.roofline"

RESULTS = Path(roofline.__file__).parent / "results"

ODD = Case("odd", 3, 26, 18, (6, 7), alpha=0.54)

FLOORS_BEFORE = {64: 51.4, 128: 25.7, 256: 17.7, 512: 15.5}
"""By channels: microseconds of one pass with its statistics at batch 128 and an H100's measured 798 TFLOP/s and 3.0
TB/s, worked out by hand before any kernel was written, from 3 activations and 3.25 L M products a pixel."""


@pytest.mark.parametrize(("network", "published"), [("resnet50", "4.09e9"), ("resnet20", "4.1e7"), ("vgg16", "3.13e8")])
def test_macs_are_the_published_ones(network: str, published: str) -> None:
    """At 224 x 224, and 32 x 32 for the other two; their linear layers are below the last digit."""
    macs = sum(one.count * useful_flops(one.case, "conv2d", "forward") for one in convolutions(network)) / 2
    mantissa = len(published.partition("e")[0].replace(".", ""))
    assert float(f"{macs:.{mantissa - 1}e}") == float(published)


@pytest.mark.parametrize("network", ["resnet20", "vgg16"])
def test_macs_are_what_the_flop_counter_counts(network: str) -> None:
    for alpha in (None, 0.5):
        model = models.MODELS[network](alpha, branch_norm=False)
        linear = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
        flops = sum(
            one.count * useful_flops(one.case, "onepass" if alpha and one.replaced else "conv2d", "forward")
            for one in convolutions(network)
        )
        assert flops == 2 * (count_macs(model, (1, 3, IMAGES[network], IMAGES[network])) - linear)


@pytest.mark.parametrize("network", IMAGES)
def test_every_convolution_is_there(network: str) -> None:
    with torch.device("meta"):
        modules = [m for m in models.MODELS[network](None).modules() if isinstance(m, nn.Conv2d)]
    found = convolutions(network)
    assert sum(one.count for one in found) == len(modules)
    assert sum(one.count for one in found if one.replaced) == sum(
        m.kernel_size == (3, 3) and m.in_channels > 3 for m in modules
    )


def test_conv2d_moves_every_tensor_once() -> None:
    case = Case("strided", 2, 6, 10, (7, 9), kernel_size=(1, 1), stride=(2, 2), padding=(0, 0))
    read, weight, y, x = 2 * 6 * 4 * 5, 60, 2 * 10 * 4 * 5, 2 * 6 * 7 * 9
    ((_, forward),) = chosen(case, "conv2d", "forward", "H100")
    assert (forward.touched, forward.flops) == (2 * (read + weight + y), {"half": 2 * 60 * 2 * 4 * 5})
    moved = [traffic.touched for _, traffic in chosen(case, "conv2d", "backward", "H100")]
    assert moved == [2 * (y + weight + x), 2 * (y + read + weight)]


@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_floors_agree_with_those_worked_out_by_hand(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand there was no gate kernel, and no pixel beyond the edges: at 7 x 7 tiles are 8 x 8."""
    ceilings = replace(DEVICES["H100"], flops=dict.fromkeys(DEVICES["H100"].flops, 798e12), bandwidth=3.0e12)
    monkeypatch.setitem(floors.DEVICES, "H100", ceilings)
    case = replace(case, batch=128)
    assert floor_seconds(case, "conv2d", "forward", "H100") == pytest.approx(37.1e-6, rel=0.01)
    by_hand = FLOORS_BEFORE[case.in_channels] * 1e-6
    if case.size == (7, 7):
        by_hand += (64 / 49 - 1) * useful_flops(case, "onepass", "forward") / 798e12
    assert floor_seconds(case, "onepass", "forward", "H100") == pytest.approx(by_hand, rel=0.11)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", [replace(RESNET50[0], batch=32), ODD], ids=str)
def test_bounds(case: Case, direction: str) -> None:
    twice = replace(case, batch=2 * case.batch)
    for path in PATHS:
        seconds = {device: floor_seconds(case, path, direction, device) for device in DEVICES}
        assert 0 < seconds["H200"] <= seconds["H100"] < seconds["A100"]
        for device, slow in seconds.items():
            assert floor_seconds(case, path, direction, device, cached=True) <= slow
            assert slow < floor_seconds(twice, path, direction, device) < 2.01 * slow
            assert floor_seconds(case, path, direction, device, torch.bfloat16) == slow
            assert floor_seconds(case, path, direction, device, torch.float32) > slow
            run = chosen(case, path, direction, device)
            assert sum(sum(t.flops.values()) for _, t in run) >= 0.9 * useful_flops(case, path, direction)
            tensors = footprint(steps(case, path, direction, DEVICES[device].capability))
            assert sum(t.touched for _, t in run) >= tensors
            assert all(t.touched <= t.requested for _, t in run)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_one_pass_beats_separate_kernels_at_large_batches(case: Case, device: str) -> None:
    for batch in (32, 128):
        for direction in DIRECTIONS:
            one, many = (
                floor_seconds(replace(case, batch=batch), p, direction, device) for p in ("onepass", "separate")
            )
            # At batch 32 the weights of 512 channels are most of what is moved, and one pass moves them four times.
            deep = case.in_channels == 512 and (batch, direction) == (32, "forward")
            assert one < (1.1 * many if deep else many), (batch, direction)


def test_the_cache_is_for_what_fits() -> None:
    """x once instead of twice as long as x, y and the rest are below 50 MiB: 12.8 MB each at batch 32, 51.4 at 128."""
    for batch, saved in ((32, True), (128, False)):
        case = replace(RESNET50[0], batch=batch)
        slow, fast = (floor_seconds(case, "onepass", "forward", "H100", cached=cached) for cached in (False, True))
        assert (fast < 0.85 * slow) == saved
        assert saved or fast == slow


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="path must be one of 'conv2d', 'separate', 'onepass', got 'fused'"):
        floor_seconds(RESNET50[0], "fused", "forward", "H100")
    with pytest.raises(ValueError, match="direction must be one of 'forward', 'backward', got 'both'"):
        floor_seconds(RESNET50[0], "conv2d", "both", "H100")
    with pytest.raises(ValueError, match="device must be one of 'A100', 'H100', 'H200', got 'V100'"):
        floor_seconds(RESNET50[0], "conv2d", "forward", "V100")
    with pytest.raises(ValueError, match="alpha must be below 1 for a layer with two branches, got 1"):
        floor_seconds(replace(RESNET50[0], alpha=1.0), "separate", "forward", "H100")


def test_totals_count_every_convolution() -> None:
    rows = [
        roofline.row(Convolution(case, count, True), 1, ("H100",))
        for case, count in zip(RESNET50, (3, 1, 2, 5), strict=True)
    ]
    sums = roofline.total(rows)
    assert sums.count == 11
    for path in PATHS:
        assert sums.seconds["H100", path] == pytest.approx(sum(r.count * r.seconds["H100", path] for r in rows))


def test_selection_prints_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(["--networks", "resnet20", "--batches", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "A model, not a measurement" in printed
    assert "## resnet20, 32 x 32, batch 2" in printed
    assert "batch 32" not in printed
    assert list(tmp_path.iterdir()) == []


def test_committed_tables_and_picture_are_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(["--out", str(tmp_path)])
    text = (tmp_path / "roofline.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    assert text == (RESULTS / "roofline.md").read_text(), f"benchmarks/results/roofline.md {STALE}"
    draw(tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "roofline.svg").read_bytes()
    drawn, committed = (words(folder / "roofline.svg") for folder in (tmp_path, RESULTS))
    assert drawn == committed, f"benchmarks/results/roofline.svg {STALE}"
    assert sum("a model, not a measurement" in word for word in drawn) == 1
    assert {"useful TFLOP/s", "useful FLOP / byte moved to and from memory", "H100, batch 128"} <= set(drawn)
    for lines in text.split("\n\n"):
        if lines.startswith("|"):
            assert len({line.count("|") for line in lines.splitlines()}) == 1


def test_readme_is_current() -> None:
    readme = " ".join((RESULTS.parent / "README.md").read_text().split())
    for case in RESNET50:
        cells = [f"{case.in_channels}@{case.size[0]}"]
        for device in DEVICES:
            seconds = (floor_seconds(replace(case, batch=128), path, "forward", device) for path in PATHS)
            cells.append(" / ".join(roofline.number(1e6 * s) for s in seconds))
        assert f"| {' | '.join(cells)} |" in readme, f"benchmarks/README.md, {cells}"
    gains = []
    for device in DEVICES:
        sums = roofline.total(roofline.row(one, 128, (device,)) for one in convolutions("resnet50"))
        gains.append(f"{sums.seconds[device, 'conv2d'] / sums.seconds[device, 'onepass']:.2f} x")
    assert f"{gains[0]} as long as one pass on an A100, {gains[1]} on an H100 and {gains[2]} on an H200" in readme


def test_readme_s_reasons_are_current() -> None:
    """The figures in what it says of where one pass cannot win."""
    readme = " ".join((RESULTS.parent / "README.md").read_text().split())
    number = roofline.number

    def of(case: Case, device: str, path: str) -> list[tuple[float, Traffic]]:
        return chosen(case, path, "forward", device)

    def us(case: Case, device: str, path: str) -> str:
        return number(1e6 * sum(seconds for seconds, _ in of(case, device, path)))

    def mb(case: Case, device: str, path: str) -> str:
        return number(sum(t.touched for _, t in of(case, device, path)) / 1e6)

    def gain(case: Case) -> float:
        return floor_seconds(case, "conv2d", "forward", "H100") / floor_seconds(case, "onepass", "forward", "H100")

    def gate(case: Case, device: str) -> str:
        return number(1e6 * of(case, device, "onepass")[1][0])

    large, deep, single = (
        replace(RESNET50[0], batch=128),
        replace(RESNET50[3], batch=128),
        replace(RESNET50[3], batch=1),
    )
    claims = [
        f"convolution: {us(large, 'H100', 'conv2d')} us for reading x and writing Y",
        f"hence {us(large, 'H100', 'onepass')} us",
        f"{mb(single, 'H100', 'onepass')} MB against conv2d's {mb(single, 'H100', 'conv2d')}",
        f"{us(single, 'H100', 'onepass')} us against {us(single, 'H100', 'conv2d')}",
        f"take {us(single, 'H100', 'separate')}",
        f"{gate(deep, 'H100')} of {us(deep, 'H100', 'onepass')} us for 512@7",
        f"{gate(deep, 'A100')} of {us(deep, 'A100', 'onepass')} on an A100",
    ]
    strided = [replace(c.case, batch=128) for c in convolutions("resnet50") if c.replaced and c.case.stride == (2, 2)]
    first, second, third = (f"{gain(case):.2f}" for case in strided)
    claims.append(f"that gives {first}, {second} and {third} x")
    executed, useful = (
        of(strided[0], "H100", "onepass")[-1][1].flops["half"],
        useful_flops(strided[0], "onepass", "forward"),
    )
    claims.append(f"{number(executed / 1e9)} GFLOP, or more, where the equations have {number(useful / 1e9)}")
    narrow = [gain(replace(c.case, batch=batch)) for c in convolutions("resnet20") if c.replaced for batch in (32, 128)]
    claims.append(f"{min(narrow):.2f} to {max(narrow):.2f} x at batch 32 and 128")
    missing = [claim for claim in claims if claim not in readme]
    assert not missing, f"benchmarks/README.md no longer says: {missing}"


def words(svg: Path) -> list[str]:
    return re.findall(r">([^<>\n]+)</(?:text|tspan)>", svg.read_text())
