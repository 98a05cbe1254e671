"""The static report: reading machine code, counting cycles, saving, and telling better from worse."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import triton

from spconv_triton.dispatch import HAS_TRITON, INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs compiled kernels: runs natively", allow_module_level=True)

from cases import RESNET50

from benchmarks import matrix, measurements, processors, static
from benchmarks.launches import CAPABILITIES, forward_launches, fusion_launches
from benchmarks.machine_code import compiling_for
from benchmarks.matrix import Compilation
from benchmarks.measurements import Row, load, measure, save

ROW = Row(
    "conv",
    "sm_90",
    "float16",
    "layer n8",
    "RELU",
    "CO=64 PIX=128 w4 s3",
    "0123456789abcdef",
    warps=4,
    registers=160,
    shared_bytes=65536,
    instructions=900,
    products=8,
    tma_loads=4,
    tma_stores=1,
    loop=100,
    loop_tma_loads=2,
    loop_products="HGMMA.64x128x16.F32 x4",
)


def test_a_descriptor_kernel_is_read() -> None:
    """ResNet-50's 256 channels at 14 x 14 on Hopper: a box of each operand a step, multiplied by warp groups."""
    case = RESNET50[2]
    found = forward_launches(case, torch.float16, CAPABILITIES["sm_90"])[-1]
    row = measure(matrix.of_launch(found, found.configs[0], "sm_90", "float16", case.name))
    assert row.kernel == "onepass_descriptor"
    assert not row.error
    assert 32 <= row.registers <= 255
    assert row.spilled_bytes == row.local == row.looped_local == 0
    assert row.shared_bytes > 3 * 2 * 64 * (64 + 64), "three stages of operands at least"
    assert row.loop_tma_loads == 2
    assert row.loop_pointer_loads == 0
    assert row.tma_loads > 2
    assert row.tma_stores > 0
    assert 30 < row.loop < 200
    assert row.loop < row.instructions
    blocks = found.constants
    pixels = blocks["BLOCK_N"] * blocks["BLOCK_H"] * blocks["BLOCK_W"]
    products = pixels * blocks["BLOCK_CO"] * blocks["BLOCK_K"]
    assert row.tensor_cycles == products / 2048
    assert row.issue_cycles == row.loop * row.warps / 4


def test_amd_s_loop_is_read() -> None:
    case = RESNET50[2]
    with compiling_for("gfx942"):
        found = next(one for one in forward_launches(case, torch.bfloat16, None) if one.name == "onepass_forward")
    row = measure(matrix.of_launch(found, found.configs[1], "gfx942", "bfloat16", case.name))
    assert row.products > 0
    assert row.loop_products.startswith("v_mfma_f32_")
    assert 0 < row.loop < row.instructions
    assert row.loop_pointer_loads > 0
    assert row.tma_loads == 0
    assert row.issue_cycles is None
    assert row.tensor_cycles is None


def test_processes_measure_alike() -> None:
    """What a process of its own finds in the matrix, by fingerprint, is what this one has."""
    one = next(one for one in matrix.compilations(["sm_120"]) if one.kernel == "fusion_blend")
    assert list(measurements.measure_all([one], 1)) == [measure(one)]


def test_cycles_are_those_of_the_design_notes() -> None:
    """Rows of the notes: issue and tensor cycles of a step."""
    for instructions, warps, hgmma, issue, tensor in (
        (254, 4, {"HGMMA.64x128x16.F32": 8}, 254, 512),
        (110, 8, {"HGMMA.64x128x16.F32": 4}, 220, 512),
        (111, 8, {"HGMMA.64x256x16.F32": 4}, 222, 1024),
        (88, 4, {"HGMMA.64x256x16.F32": 2}, 88, 256),
        (160, 4, {"HGMMA.64x64x16.F32.BF16": 8}, 160, 256),
    ):
        assert processors.issue_cycles("sm_90", instructions, warps) == issue
        assert processors.tensor_cycles("sm_90", hgmma, warps) == tensor
    # 128 x 128 x 32 by 8 warps on an A100: 524288 multiply-adds at 1024 a cycle, at half of it in TF32.
    assert processors.tensor_cycles("sm_80", {"HMMA.16816.F32": 32}, 8) == 512
    assert processors.tensor_cycles("sm_80", {"HMMA.1688.F32.TF32": 64}, 8) == 1024
    assert processors.tensor_cycles("sm_90", {"HGMMA.64x128x8.F32.TF32": 4}, 4) == 256
    for unknown in ({}, {"UTCHMMA": 2}, {"v_mfma_f32_32x32x8_f16": 4}, {"HGMMA.64x128x16.F32": 1, "HMMA.16816.F32": 1}):
        assert processors.tensor_cycles("sm_90", unknown, 4) is None
    assert processors.tensor_cycles("sm_120", {"HMMA.16816.F32": 4}, 4) is None
    assert processors.issue_cycles("gfx942", 100, 4) is None


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "columns", "expected"),
    [
        ("sm_90", 32, 0, 4, 0, 16),  # 64 warps
        ("sm_90", 128, 0, 4, 0, 4),
        ("sm_90", 129, 0, 4, 0, 3),  # allocated in steps of 8
        ("sm_90", 168, 0, 8, 0, 1),  # 12 warps of 5376 registers
        ("sm_90", 255, 0, 8, 0, 1),
        ("sm_90", 64, 75 * 1024, 4, 0, 3),  # with the system's 1 KiB, 76 of 228
        ("sm_90", 64, 76 * 1024, 4, 0, 2),
        ("sm_90", 64, 228 * 1024, 4, 0, 0),
        ("sm_90", 16, 0, 1, 0, 32),
        ("sm_100", 64, 1024, 4, 256, 2),  # halves of the tensor memory
        ("sm_80", 64, 54 * 1024, 4, 0, 2),
        ("sm_120", 16, 0, 4, 0, 12),  # 48 warps
        ("sm_120", 64, 49 * 1024, 4, 0, 2),
        ("gfx942", 128, 0, 4, 0, 4),  # four waves of 512 registers in each part
        ("gfx942", 136, 0, 4, 0, 3),
        ("gfx942", 512, 0, 4, 0, 1),
        ("gfx942", 64, 32 * 1024, 4, 0, 2),
    ],
)
def test_programs_of_a_processor(
    target: str, registers: int, shared: int, warps: int, columns: int, expected: int
) -> None:
    assert processors.programs(target, registers, shared, warps, columns) == expected


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "results" / "static.json"
    failed = Row(*ROW.identity[:4], "", "CO=32 w8 s2", "f", warps=8, error="CompilationError: no")
    save(file, [ROW, failed])
    assert load(file) == sorted([ROW, failed])
    assert json.loads(file.read_text())["triton"] == triton.__version__
    assert sum(line.startswith('["conv"') for line in file.read_text().splitlines()) == 2, "a line for each row"
    assert [path.name for path in file.parent.iterdir()] == ["static.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"format": 0}', '{"format": 1, "columns": ["kernel"], "rows": [[1, 2]]}'])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "static.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"static\.json is not a static report of format 1"):
        load(file)


@pytest.mark.parametrize(
    ("change", "text", "worse"),
    [
        ({"registers": 168}, "registers 160 -> 168", False),
        ({"registers": 176}, "registers 160 -> 176, programs 3 -> 2", True),
        ({"spilled_bytes": 8}, "spilled bytes none -> 8", True),
        ({"shared_bytes": 32768}, "shared bytes 65536 -> 32768", False),
        ({"shared_bytes": 131072}, "shared bytes 65536 -> 131072, programs 3 -> 1", True),
        ({"loop": 104}, "instructions a step 100 -> 104", False),
        ({"loop": 106}, "instructions a step 100 -> 106", True),
        ({"loop": 90}, "instructions a step 100 -> 90", False),
        ({"loop_products": "FFMA x512"}, "products HGMMA.64x128x16.F32 x4 -> FFMA x512", True),
        (
            {"loop_products": "HGMMA.64x64x16 x8"},
            "products HGMMA.64x128x16.F32 x4 -> HGMMA.64x64x16 x8",
            False,
        ),
        ({"loop_tma_loads": 1}, "TMA loads a step 2 -> 1", True),
        ({"error": "CompilationError: no"}, "does not compile: CompilationError: no", True),
    ],
)
def test_changes_of_a_row(change: dict[str, object], text: str, worse: bool) -> None:
    before = ROW._replace(shared_bytes=65536)
    after = before._replace(fingerprint="f", **change)
    (found,) = static.changes([before], [after])
    assert (found.what, found.worse) == (text, worse)
    assert str(found).startswith("WORSE conv, sm_90" if worse else "conv, sm_90")
    assert static.changes([after], [after]) == []
    assert static.changes([before], [before._replace(fingerprint="f")]) == []


def test_a_program_less_of_many_is_not_worse() -> None:
    before = ROW._replace(registers=64, shared_bytes=0)
    (found,) = static.changes([before], [before._replace(registers=72)])
    assert found == static.Change(str(ROW), "registers 64 -> 72, programs 8 -> 7", False)
    (found,) = static.changes([before], [before._replace(registers=88)])
    assert found == static.Change(str(ROW), "registers 64 -> 88, programs 8 -> 5", True)


def test_a_repaired_row_is_not_worse() -> None:
    broken = ROW._replace(error="CompilationError: no")
    assert static.changes([broken], [ROW]) == [static.Change(str(ROW), "compiles", False)]


def test_new_and_gone_rows_are_told() -> None:
    other = ROW._replace(kernel="other")
    assert static.changes([ROW], [other]) == [
        static.Change(str(ROW), "gone", False),
        static.Change(str(other), "new", False),
    ]
    assert static.changes([], [ROW._replace(spilled_bytes=4)])[0].worse


def test_table_gives_ranges() -> None:
    rows = [ROW, ROW._replace(layer="wide", registers=200, loop=120), ROW._replace(target="sm_80", loop_products="")]
    rows.append(ROW._replace(tile="CO=16 w4 s3", error="no"))
    head, rule, *lines = static.table(rows).splitlines()
    assert rule.count("|") == head.count("|")
    assert [line.count("|") for line in lines] == [head.count("|")] * 3
    assert lines[0].startswith("| conv | CO=16 w4 s3 | sm_90 | 1 | does not compile |")
    assert lines[1].endswith(" | sm_80 | 1 | 160 | 0 | 64 | 2 | 8 | 4 + 1 | 100 | 100 |")
    assert lines[2].endswith(
        " | sm_90 | 2 | 160 to 200 | 0 | 64 | 2 to 3 | 8 | 4 + 1 | 100 to 120 | 100 to 120 / 256 |"
    )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Compilation]:
    """A matrix of three kernels."""
    found = fusion_launches(RESNET50[2], torch.float16)[:2]
    two = [matrix.of_launch(one, one.configs[-1], "sm_90", "float16", "small") for one in found]
    three = [*two, matrix.of_launch(found[1], found[1].configs[-1], "gfx942", "float16", "small")]
    monkeypatch.setattr(matrix, "compilations", lambda: iter(three))
    return three


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Targets of what would be compiled, in order."""
    found: list[str] = []

    def measure_all(wanted: Sequence[Compilation], jobs: int) -> Iterator[Row]:
        assert jobs >= 1
        for one in wanted:
            found.append(one.target)
            yield Row(*one.identity, one.fingerprint, one.warps, registers=40, instructions=100)

    monkeypatch.setattr(static, "measure_all", measure_all)
    return found


def test_only_what_changed_is_compiled(
    small: list[Compilation], compiled: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "static.json"
    arguments = ["--report", str(report)]
    assert static.main([*arguments, "--target", "sm_90"]) == 0
    assert compiled == ["sm_90"] * 2
    assert {row.fingerprint for row in load(report)} == {one.fingerprint for one in small[:2]}
    assert static.main(arguments) == 0
    assert compiled == ["sm_90", "sm_90", "gfx942"]
    first = load(report)
    assert static.main(arguments) == 0
    assert len(compiled) == 3
    # A row whose kernel has changed since, one that nothing launches any more, and one under another name.
    stale = [first[0]._replace(fingerprint="stale"), first[1], first[2]._replace(layer="renamed")]
    save(report, [*stale, ROW])
    assert static.main(arguments) == 0
    assert compiled[3:] == [first[0].target]
    assert load(report) == first
    assert static.main([*arguments, "--fresh", "--kernel", "blend"]) == 0
    assert compiled[4:] == ["sm_90", "gfx942"]
    output = capsys.readouterr()
    assert "| fusion_blend | C=16 PIX=64 w4 s2 | gfx942 | 1 |" in output.out
    assert "1 of 1 compiled" in output.err
    assert "| fusion_blend |" in report.with_suffix(".md").read_text()


@pytest.mark.usefixtures("small")
def test_a_filtered_run_keeps_the_rest(compiled: list[str], tmp_path: Path) -> None:
    """Even what is stale: it is still what was last compiled under that name."""
    report = tmp_path / "static.json"
    static.main(["--report", str(report)])
    rows = load(report)
    index = next(i for i, row in enumerate(rows) if row.target == "gfx942")
    rows[index] = rows[index]._replace(fingerprint="stale")
    save(report, rows)
    del compiled[:]
    static.main(["--report", str(report), "--target", "sm_90"])
    assert compiled == []
    assert load(report) == rows


@pytest.mark.usefixtures("small", "compiled")
def test_against_says_what_got_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, before = tmp_path / "static.json", tmp_path / "before.json"
    static.main(["--report", str(report)])
    rows = load(report)
    save(before, rows)
    arguments = ["--report", str(report), "--against", str(before)]
    assert static.main(arguments) == 0
    assert "0 rows differ, 0 of them for the worse" in capsys.readouterr().out
    save(before, [row._replace(registers=row.registers + 8) for row in rows])
    assert static.main(arguments) == 0
    assert "3 rows differ, 0 of them for the worse" in capsys.readouterr().out
    save(report, [row._replace(spilled_bytes=64 * (row.target == "gfx942")) for row in rows])
    save(before, rows)
    assert static.main([*arguments, "--target", "sm_90"]) == 0
    assert static.main(arguments) == 1
    output = capsys.readouterr().out
    assert "WORSE fusion_blend, gfx942, float16, small" in output
    assert "spilled bytes none -> 64" in output
