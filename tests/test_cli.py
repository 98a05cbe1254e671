"""The command line: what it prints, writes and refuses, and with which exit status."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from spconv_triton import models
from spconv_triton.training import checkpoint, cli, datasets, demo
from spconv_triton.training.errors import UserError
from spconv_triton.training.learner import Learner, Score
from spconv_triton.training.measure import count_parameters

TRAIN = ("train", "--samples", "32", "--batch-size", "16", "--image-size", "8", "--device", "cpu", "--threads", "1")
PROGRAM = (sys.executable, "-m", "spconv_triton")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a command ends in; exit status 2, nothing on stdout."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1, output.err
    assert output.err.startswith("python -m spconv_triton"), output.err
    return output.err


def train(out: Path, *arguments: str) -> None:
    assert cli.main([*TRAIN, "--out", str(out), *arguments]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: COMMAND"),
        (("fly",), "invalid choice: 'fly'"),
        (("train", "--alpha", "1.5"), "--alpha: must be in (0, 1], as 0.5 or 1/2, got '1.5'; none trains"),
        (("train", "--alpha", "half"), "got 'half'"),
        (("train", "--alpha", "1/0"), "got '1/0'"),
        (("demo", "--alpha", "0"), "--alpha: must be in (0, 1]"),
        (("demo", "--epochs", "0"), "--epochs: must be an integer of at least 1, got '0'"),
        (("train", "--epochs", "two"), "got 'two'"),
        (("train", "--lr", "-1"), "--lr: must be a number of float32 of at least 0, got '-1'"),
        (("train", "--lr", "nan"), "got 'nan'"),
        (("train", "--workers", "-1"), "--workers"),
        (("train", "--amp", "int8"), "--amp: invalid choice: 'int8'"),
        (("train", "--model", "resnet21"), "--model must be one of resnet20, resnet50, vgg16, got 'resnet21'"),
        (("train", "--model", "vgg16"), "--image-size must be at least 32 for vgg16, got 16"),
        (("train", "--groups", "3"), "--groups must divide out_channels=16, got groups=3"),
        (("train", "--data", "mnist"), "--data must be digits, cifar10:DIR or folder:DIR, got 'mnist'"),
        (("train", "--data", "cifar10:nowhere"), "there is no folder nowhere"),
        (("train", "--data", "folder:nowhere"), "there is no folder nowhere"),
        (("train", "--samples", "9999"), "--samples must be between 1 and 1437, got 9999"),
        (("train", "--batch-size", "2000"), "--batch-size must be at most the 1437 training images, got 2000"),
        (("train", "--device", "abacus"), "--device must be auto, cpu, cuda or cuda:N, got 'abacus'"),
        (("train", "--device", "cuda:99"), "--device cuda:99: there is no such device"),
        (("demo", "--device", "cuda:99"), "--device cuda:99: there is no such device"),
        (("train", "--resume", "nowhere.pt"), "cannot read the checkpoint nowhere.pt: No such file or directory"),
    ],
)
def test_bad_arguments(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_out_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert "cannot create the folder" in refused(capsys, *TRAIN, "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("module", "package", "arguments"),
    [
        ("rich.console", "rich", TRAIN),
        ("sklearn.datasets", "scikit-learn", TRAIN),
        ("torchvision", "torchvision", ("train", "--data", "folder:.")),
        ("matplotlib", "matplotlib", ("demo",)),
        ("rich.progress", "rich", ("demo",)),
    ],
)
def test_missing_dependency(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    package: str,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)  # what an import of a package that is not there does
    message = refused(capsys, *arguments)
    assert f"needs {package} " in message
    assert "pip install 'split-conv-triton[train]'" in message


def test_train_reports_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--epochs", "3", "--save-every", "2", "--alpha", "1/4")
    lines = capsys.readouterr().out.splitlines()
    parameters = count_parameters(models.resnet20(0.25, in_channels=1))
    assert lines[0] == f"resnet20, alpha 0.25: {parameters:,} parameters, on cpu, 1 process"
    assert [line.partition(":")[0] for line in lines[1:4]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert f"test accuracy {100 * records[2]['test_accuracy']:.2f} %" in lines[3]
    last, best = (checkpoint.load(tmp_path / name) for name in ("last.pt", "best.pt"))
    accuracies = [record["test_accuracy"] for record in records]
    assert last["epoch"] == 3
    assert best["epoch"] == 1 + accuracies.index(max(accuracies))
    assert last["best"] == best["best"] == max(accuracies)
    models.resnet20(0.25, in_channels=1).load_state_dict(last["state"]["network"])


def test_checkpoints_come_every_so_many_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda path, *, epoch, **_: saved.append((path.name, epoch)))
    train(tmp_path, "--epochs", "5", "--save-every", "2")
    assert [epoch for name, epoch in saved if name == "last.pt"] == [2, 4, 5]
    assert ("best.pt", 1) in saved


def test_a_finished_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--epochs", "1")
    before = (tmp_path / "last.pt").read_bytes()
    capsys.readouterr()
    assert "holds a run already; go on with it (--resume)" in refused(capsys, *TRAIN, "--out", tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_run_that_ended_before_its_first_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Goes on from its best one; a log alone is not begun over."""
    train(tmp_path, "--epochs", "1")
    (tmp_path / "last.pt").unlink()
    capsys.readouterr()
    best = tmp_path / "best.pt"
    advice = f"go on with it (--resume {best}) or choose another folder"
    assert advice in refused(capsys, *TRAIN, "--epochs", "1", "--out", tmp_path)
    train(tmp_path, "--epochs", "1", "--resume", str(best))
    best.unlink()
    capsys.readouterr()
    assert "without a checkpoint; remove its metrics.jsonl" in refused(capsys, *TRAIN, "--out", tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text()


def test_going_on_in_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not there is not named, where nothing gets better, and where there is nothing left to do."""
    monkeypatch.setattr(Learner, "evaluate", lambda *_: Score(1.0, 0.5))
    one, other, third, missing = (tmp_path / name for name in ("one", "other", "third", "missing"))
    train(one, "--epochs", "3")
    assert checkpoint.load(one / "best.pt")["epoch"] == 1
    capsys.readouterr()
    train(other, "--epochs", "3", "--resume", str(one / "best.pt"))
    assert sorted(os.listdir(other)) == ["last.pt", "metrics.jsonl"]
    told = capsys.readouterr().out.splitlines()[-1]
    assert f"last.pt, metrics.jsonl in {other}; the best network is an earlier one" in told
    assert told.endswith(f"look beside {one / 'best.pt'}")
    train(third, "--epochs", "3", "--resume", str(other / "last.pt"))
    assert f"nothing new in {third}" in capsys.readouterr().out
    refused(capsys, *TRAIN, "--out", missing, "--resume")
    assert not missing.exists()


def test_steps_that_the_scaler_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the first of two. They do not count in the schedule, and PyTorch has nothing to warn of."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=1e30, backoff_factor=1e-29)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    train(tmp_path, "--epochs", "1", "--amp", "float16")
    assert checkpoint.load(tmp_path / "last.pt")["state"]["scheduler"]["last_epoch"] == 1


def test_a_folder_is_named_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets are no markup."""
    out = tmp_path / "run[lr=0.1][" / "x]"
    train(out, "--epochs", "1")
    assert f"metrics.jsonl in {out}" in capsys.readouterr().out


def test_an_option_that_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [argument for argument in TRAIN if argument not in ("--image-size", "8")]
    assert cli.main([*arguments, "--epochs", "1", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert "--image-size must be left out to go on with" in refused(
        capsys, *TRAIN, "--epochs", "1", "--out", tmp_path, "--resume"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "2"), "--epochs must be 1 to go on with"),
        (("--alpha", "none"), "--alpha must be 0.5 to go on with"),
        (("--seed", "1"), "--seed must be 0"),
        (("--lr", "0.2"), "--lr must be 0.1"),
        (("--no-branch-norm",), "--branch-norm must be True"),
    ],
)
def test_resuming_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    train(tmp_path, "--epochs", "1")
    capsys.readouterr()
    assert message in refused(capsys, *TRAIN, "--epochs", "1", "--out", tmp_path, "--resume", *arguments)


def test_resuming_what_is_not_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--epochs", "1")
    capsys.readouterr()
    arguments = (*TRAIN, "--epochs", "1", "--out", tmp_path / "new", "--resume")
    whole = (tmp_path / "last.pt").read_bytes()
    damaged, foreign = tmp_path / "damaged.pt", tmp_path / "foreign.pt"
    damaged.write_bytes(whole[: len(whole) // 2])
    assert "damaged or not a checkpoint" in refused(capsys, *arguments, damaged)
    torch.save(models.resnet20().state_dict(), foreign)
    assert "is not a checkpoint of spconv_triton" in refused(capsys, *arguments, foreign)
    for damage in (
        lambda state: state["network"].pop("fc.bias"),
        lambda state: state["network"].update(more=torch.zeros(1)),
        lambda state: state["network"].update({"bn1.running_mean": torch.zeros(3)}),
        lambda state: state["optimizer"]["state"].pop("fc.bias"),
        lambda state: state["optimizer"]["state"]["fc.bias"].update(momentum_buffer=torch.zeros(3)),
        lambda state: state["optimizer"]["param_groups"].pop(),
        lambda state: state["optimizer"]["param_groups"][0]["params"].pop(),
        lambda state: state.pop("scheduler"),
    ):
        content = checkpoint.load(tmp_path / "last.pt")
        damage(content["state"])
        torch.save(content, foreign)
        assert "does not fit --model resnet20" in refused(capsys, *arguments, foreign)
    assert "is not a checkpoint" not in refused(capsys, *arguments, tmp_path / "nowhere.pt")


def test_full_disk_in_the_second_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, replace = checkpoint.save, os.replace

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def second_fails(path: Path, *, epoch: int, **content: object) -> None:
        monkeypatch.setattr(os, "replace", full if epoch == 2 else replace)
        save(path, epoch=epoch, **content)

    monkeypatch.setattr(checkpoint, "save", second_fails)
    assert cli.main([*TRAIN, "--epochs", "2", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left on device" in error
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt", "metrics.jsonl"]


def test_divergence_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TRAIN, "--lr", "1e30", "--epochs", "3", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "training diverged in epoch" in error
    assert "lower --lr" in error


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--epochs", "2", "--samples", "128", "--image-size", "8", "--rounds", "2", "--device", "cpu"]
    assert cli.main(["demo", *arguments, "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["backend"] == "native"
    assert "backend native on CPU, 1 thread" in " ".join(table.split())
    names = [row["quantity"] for row in report["rows"]]
    assert names == [
        "parameters",
        "MACs per image",
        "test accuracy",
        "latency, batch 1",
        "latency, batch 64",
        "training step, batch 64",
        "kept for backward, batch 64",
    ]
    for row in (demo.Row(**values) for values in report["rows"]):
        assert min(row.vanilla, row.spconv) > 0, row
        for text in row.texts():
            assert table.count(text) >= 1, f"{text} is not in the table"
            assert text in (tmp_path / "results.md").read_text()
    parameters, accuracy = demo.Row(**report["rows"][0]), demo.Row(**report["rows"][2])
    assert parameters.vanilla == count_parameters(models.resnet20(in_channels=1))
    assert parameters.spconv == count_parameters(models.resnet20(0.5, in_channels=1, branch_norm=False))
    assert parameters.ratio == parameters.spconv / parameters.vanilla
    assert accuracy.spconv == 100 * report["curves"]["SPConv"]["test"][-1]["accuracy"]
    assert [len(curve["train"]) for curve in report["curves"].values()] == [2, 2]
    image = pytest.importorskip("PIL.Image").open(tmp_path / "curves.png")
    assert image.format == "PNG"
    assert min(image.size) > 300
    assert len(image.convert("RGB").getcolors(100_000)) > 10, "an empty picture"
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "results.json", "results.md"]


def test_networks_of_the_demo_see_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[torch.Tensor]] = {}
    step = demo.Learner.step

    def watched(self: demo.Learner, images: torch.Tensor, labels: torch.Tensor) -> None:
        seen.setdefault(id(self), []).append(images.clone())
        step(self, images, labels)

    monkeypatch.setattr(demo.Learner, "step", watched)
    options = demo.Options(tmp_path, epochs=2, samples=128, size=8, rounds=1, device="cpu")
    demo.run(options)
    first, second = seen.values()
    assert len(first) == len(second) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[2]), "both epochs are alike"


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def test_as_a_program(tmp_path: Path) -> None:
    done = run("train", "--data", "folder:nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "python -m spconv_triton: error: --data: there is no folder nowhere\n"


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    """Also from a process that loads images, whose errors come wrapped in its traceback."""
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(2):
                image.new("RGB", (16, 16)).save(tmp_path / split / name / f"{index}.png")
    whole = (tmp_path / "train" / "a" / "1.png").read_bytes()
    (tmp_path / "train" / "a" / "1.png").write_bytes(whole[:40])
    arguments = ["--data", f"folder:{tmp_path}", "--image-size", "16", "--batch-size", "2", "--workers", "1"]
    done = run("train", *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"cannot read the image {tmp_path}/train/a/1.png" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_image_of_impossible_size_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few damaged bytes of a header claim it; Pillow's refusal is an exception of its own."""
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 100)
    image.new("RGB", (16, 16)).save(tmp_path / "large.bmp")
    with pytest.raises(UserError, match=r"cannot read the image .*large\.bmp: Image size \(256 pixels\) exceeds limit"):
        datasets._read_image(str(tmp_path / "large.bmp"))


def test_ctrl_c_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    command = [*PROGRAM, *TRAIN, "--epochs", "100000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that a shell put in the background ignores SIGINT, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not (tmp_path / "last.pt").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, error
    assert error == "python -m spconv_triton: interrupted; what was written before stays\n"
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] >= 1
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
