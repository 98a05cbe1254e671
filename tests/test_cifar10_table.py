"""The CIFAR-10 recipe: the real loader on a few images in the same file format, and a table that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cifar10_files import write_cifar10

from benchmarks import cifar10


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Eight images in each file, bright ones of class 1 and dark ones of class 0."""
    labels = torch.arange(48, dtype=torch.uint8) % 2
    images = torch.randint(0, 64, (48, 3, 32, 32), dtype=torch.uint8) + 180 * labels[:, None, None, None]
    write_cifar10(tmp_path / "cifar-10-batches-bin", images, labels)
    return tmp_path


def test_table_goes_on(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [str(directory), "--epochs", "1", "--batch-size", "8", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert cifar10.main([*common, "--networks", "resnet20", "--layers", "conv2d"]) == 0
    assert cifar10.main([*common, "--networks", "resnet20"]) == 0
    runs = [json.loads(line) for line in (tmp_path / "out" / cifar10.RUNS).read_text().splitlines()]
    assert [run["row"] for run in runs] == [
        "resnet20 conv2d",
        "resnet20 spconv alpha 0.5",
        "resnet20 spconv alpha 0.25",
    ]
    assert all(0 <= run["accuracy"] <= 100 for run in runs)
    printed, shown = capsys.readouterr()
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| resnet20")]
    assert [cell.strip() for cell in rows[-2][:3]] == ["resnet20 spconv alpha 0.5", "0.104, 0.10", "15.19, 17.91"]
    assert shown.count("seed 0") == 3


def test_table_is_of_the_runs_that_were_asked_for(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    common = [str(directory), "--networks", "resnet20", "--layers", "conv2d", "--epochs", "1", "--device", "cpu"]
    for size in ("4", "8"):
        capsys.readouterr()
        assert cifar10.main([*common, "--out", str(out), "--batch-size", size]) == 0
    *_, last = [json.loads(line) for line in (out / cifar10.RUNS).read_text().splitlines()]
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| resnet20")]
    assert f"{last['accuracy']:.2f}, 92 |" in row
    with (out / cifar10.RUNS).open("a") as file:
        file.write('{"row": "res')
    assert cifar10.main([*common, "--out", str(out), "--batch-size", "8"]) == 2
    assert f"a line of {out / cifar10.RUNS} is damaged" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cifar10.main([*common, "--epochs", "0"])


def test_every_row_builds() -> None:
    with torch.device("meta"):
        for row in cifar10.TABLE:
            assert row.build() is not None
    assert len({row.key for row in cifar10.TABLE}) == len(cifar10.TABLE)


def test_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cifar10.main([str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
