"""Data, steps, measurements, resumed runs, and several processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cifar10_files import write_cifar10
from torch import Tensor, nn

from spconv_triton import models
from spconv_triton.training import checkpoint, cli, datasets, learner, measure
from spconv_triton.training.data import (
    WEIGHTS,
    Data,
    Images,
    evaluation_batches,
    random_shift,
    seed_epoch,
    steps_per_epoch,
    training_batches,
)
from spconv_triton.training.errors import UserError
from spconv_triton.training.learner import Learner, Recipe
from spconv_triton.training.processes import Processes

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = Processes(0, 1, torch.device("cpu"))
QUICK = ("train", "--samples", "48", "--batch-size", "16", "--image-size", "8", "--device", "cpu", "--threads", "1")


def tiny(samples: int = 20, *, shift: int = 0, flip: bool = False) -> Data:
    images = torch.randint(0, 256, (samples, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(samples) % 3
    half = samples // 2
    train, test = Images(images[:half], labels[:half]), Images(images[half:], labels[half:])
    return Data(train, test, 3, 3, 8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), shift, flip)


def linear_learner(data: Data, recipe: Recipe) -> Learner:
    return Learner(nn.Sequential(nn.Flatten(), nn.Linear(data.channels * data.size**2, data.classes)), recipe, ALONE)


def flatten(state: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, list):
        items = enumerate(state)
    else:
        return {prefix: state}
    return {k: v for key, value in items for k, v in flatten(value, f"{prefix}.{key}").items()}


def assert_identical(ours: Any, theirs: Any) -> None:
    ours, theirs = flatten(ours), flatten(theirs)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        same = torch.equal(value, theirs[key]) if isinstance(value, Tensor) else value == theirs[key]
        assert same, f"{key} differs: {value} and {theirs[key]}"


def test_digits_are_split_once_and_evenly() -> None:
    first, second = datasets.digits(8), datasets.digits(8)
    assert torch.equal(first.train.images, second.train.images)
    assert (len(first.train), len(first.test)) == (1437, 360)
    counts = torch.bincount(first.test.labels)
    assert counts.min() >= 34, counts
    assert counts.max() <= 38, counts
    both = torch.cat([first.train.images, first.test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 1797, "an image is in both halves"
    assert 0 <= both.min() < both.max() <= 1
    normal = first.prepare(first.train.images, torch.device("cpu"), augment=False)
    assert abs(normal.mean()) < 1e-4
    assert abs(normal.std() - 1) < 1e-4


def test_digits_are_enlarged_and_sampled() -> None:
    data = datasets.load("digits", 24, 100)
    assert data.train.images.shape == (100, 1, 24, 24)
    assert len(data.test) == 360
    assert torch.bincount(data.train.labels, minlength=10).min() > 0


def test_random_shift_moves_each_image_alone() -> None:
    images = torch.rand(50, 2, 5, 6) + 1
    padded = F.pad(images, (2, 2, 2, 2))
    moved = random_shift(images, 2)
    places = []
    for index in range(50):
        windows = {(r, c): padded[index, :, r : r + 5, c : c + 6] for r in range(5) for c in range(5)}
        places.append([place for place, window in windows.items() if torch.equal(window, moved[index])])
    assert all(len(found) == 1 for found in places)
    assert {found[0][0] for found in places} == set(range(5)), "not all offsets were drawn"


def test_prepare_mirrors_half_and_normalises() -> None:
    data = tiny(200, flip=True)
    raw = data.train.images
    plain = data.prepare(raw, ALONE.device, augment=False)
    assert plain.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain[0, 2, 3, 4], (raw[0, 2, 3, 4] / 255 - 0.3) / 0.4)
    augmented = data.prepare(raw, ALONE.device, augment=True)
    mirrored = [torch.equal(a, p.flip(2)) for a, p in zip(augmented, plain, strict=True)]
    kept = [torch.equal(a, p) for a, p in zip(augmented, plain, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 20 < sum(mirrored) < 80


def test_batches_follow_from_seed_and_epoch() -> None:
    data = tiny(40, shift=2, flip=True)

    def epoch(seed: int, number: int) -> Tensor:
        torch.rand(3)  # whatever was drawn before
        return torch.cat([images for images, _ in training_batches(data, 5, seed, number, ALONE)])

    assert torch.equal(epoch(0, 4), epoch(0, 4))
    assert not torch.equal(epoch(0, 4), epoch(0, 5))
    assert not torch.equal(epoch(0, 4), epoch(1, 4))


def test_processes_share_the_samples() -> None:
    data = tiny(43)
    data.train.labels, data.test.labels = torch.arange(21), torch.arange(22)
    shares = [Processes(rank, 2, ALONE.device) for rank in range(2)]
    trained = [label for p in shares for _, labels in training_batches(data, 10, 0, 0, p) for label in labels.tolist()]
    assert len(trained) == len(set(trained)) == 20 == 10 * steps_per_epoch(data, 10, 2)
    tested = [label for p in shares for _, labels in evaluation_batches(data, 4, p) for label in labels.tolist()]
    assert sorted(tested) == list(range(22))


@pytest.mark.parametrize(
    ("batch_size", "world", "message"),
    [(9, 2, "multiple of the 2 processes"), (12, 1, "at most the 10 training"), (3, 2, "two per process")],
)
def test_batch_sizes_that_do_not_fit(batch_size: int, world: int, message: str) -> None:
    with pytest.raises(UserError, match=f"--batch-size must be .*{message}.*, got {batch_size}"):
        steps_per_epoch(tiny(), batch_size, world)


def cifar10_images() -> tuple[Tensor, Tensor]:
    """Three for each file, and their labels."""
    return torch.randint(0, 256, (18, 3, 32, 32), dtype=torch.uint8), torch.arange(18) % 10


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_cifar10(tmp_path: Path, inner: str) -> None:
    images, labels = cifar10_images()
    write_cifar10(tmp_path / "data" / inner, images, labels)
    data = datasets.load(f"cifar10:{tmp_path / 'data'}")
    assert torch.equal(data.train.images, images[:15])
    assert torch.equal(data.train.labels, labels[:15])
    assert torch.equal(data.test.images, images[15:])
    assert torch.equal(data.test.labels, labels[15:])
    assert (data.classes, data.channels, data.size, data.flip) == (10, 3, 32, True)


def test_cifar10_that_is_damaged(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "data", *cifar10_images())
    path = tmp_path / "data" / "data_batch_3.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"data_batch_3\.bin must be whole records of 3073 bytes, got 9218"):
        datasets.load(f"cifar10:{tmp_path / 'data'}")
    path.write_bytes(b"\x0b" + whole[1:])
    with pytest.raises(UserError, match=r"data_batch_3\.bin must have labels of 0 to 9, got 11"):
        datasets.load(f"cifar10:{tmp_path / 'data'}")
    path.unlink()
    with pytest.raises(UserError, match=r"has no data_batch_3\.bin"):
        datasets.load(f"cifar10:{tmp_path / 'data'}")


def test_cifar10_pickles_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cos\nsystem\n")
    for directory in (tmp_path, tmp_path / "cifar-10-batches-py"):
        with pytest.raises(UserError, match=r"python version .* get the binary version, cifar-10-binary\.tar\.gz"):
            datasets.load(f"cifar10:{directory}")


def write_folder(directory: Path, splits: tuple[str, ...] = ("train", "val")) -> None:
    image = pytest.importorskip("PIL.Image")
    for split in splits:
        for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            (directory / split / name).mkdir(parents=True)
            for index in range(4):
                image.new("RGB", (20 + index, 18), colour).save(directory / split / name / f"{index}.png")


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_folder(tmp_path: Path, held_out: str) -> None:
    write_folder(tmp_path, ("train", held_out))
    data = datasets.load(f"folder:{tmp_path}", 16)
    assert (len(data.train), len(data.test), data.classes, data.size) == (8, 8, 2, 16)
    for images, labels in (*training_batches(data, 8, 0, 0, ALONE), *evaluation_batches(data, 8, ALONE)):
        assert images.shape == (8, 3, 16, 16)
        assert labels.tolist().count(0) == 4
        blue = torch.tensor([(c - m) / s for c, m, s in zip((0, 0, 1), data.mean, data.std, strict=True)])
        torch.testing.assert_close(images[labels == 0], blue[:, None, None].expand(4, 3, 16, 16))


def test_folders_that_will_not_do(tmp_path: Path) -> None:
    source = f"folder:{tmp_path}"
    with pytest.raises(UserError, match="must hold the folders train and val"):
        datasets.load(source)
    write_folder(tmp_path)
    with pytest.raises(UserError, match="--samples does not go with a folder"):
        datasets.load(source, samples=3)
    (tmp_path / "val" / "blue").rename(tmp_path / "val" / "green")
    with pytest.raises(UserError, match=r"must have the same classes; only one has \['blue', 'green'\]"):
        datasets.load(source)
    for path in (tmp_path / "val" / "green").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"--data: .*green"):
        datasets.load(source)


@pytest.mark.parametrize(
    ("source", "size", "samples", "message"),
    [
        ("mnist", None, None, "--data must be digits, cifar10:DIR or folder:DIR, got 'mnist'"),
        ("cifar10:", None, None, "--data must be"),
        ("digits", 7, None, "--image-size must be at least 8, got 7"),
        ("digits", None, 1438, "--samples must be between 1 and 1437, got 1438"),
        ("cifar10:nowhere", 16, None, "--image-size must be 32 for cifar10, got 16"),
        ("cifar10:nowhere", None, None, "there is no folder nowhere"),
        ("folder:nowhere", None, None, "there is no folder nowhere"),
    ],
)
def test_data_that_is_not_there(source: str, size: int | None, samples: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        datasets.load(source, size, samples)


def test_learning_rate_rises_and_falls() -> None:
    factors = [Recipe(1.0, 0.0, steps=100).factor(step) for step in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.001
    assert Recipe(1.0, 0.0, steps=1).factor(0) > 0


def test_step_is_sgd_with_nesterov_momentum() -> None:
    data = tiny()
    subject = linear_learner(data, Recipe(0.1, 0.01, steps=20))
    weight, bias = (p.detach().clone().requires_grad_() for p in subject.network.parameters())
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    losses = []
    for step, (images, labels) in enumerate(training_batches(data, 5, 0, 0, ALONE)):
        loss = F.cross_entropy(F.linear(images.flatten(1), weight, bias), labels)
        gradients = torch.autograd.grad(loss, (weight, bias))
        losses.append(loss.item())
        with torch.no_grad():
            for index, (parameter, gradient, decay) in enumerate(
                zip((weight, bias), gradients, (0.01, 0.0), strict=True)
            ):
                total = gradient + decay * parameter
                velocity[index] = 0.9 * velocity[index] + total
                parameter -= 0.1 * subject.recipe.factor(step) * (total + 0.9 * velocity[index])
        subject.step(images, labels)
    torch.testing.assert_close(list(subject.network.parameters()), [weight, bias])
    assert subject.finish_epoch().loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_score_weighs_batches_by_their_size() -> None:
    data = tiny(34)
    subject = linear_learner(data, Recipe(0.1, 0.0, steps=1))
    score = subject.evaluate(evaluation_batches(data, 5, ALONE))  # 5, 5, 5, 2
    outputs = subject.network(data.prepare(data.test.images, ALONE.device, augment=False))
    assert score.loss == pytest.approx(F.cross_entropy(outputs, data.test.labels).item(), rel=1e-5)
    assert score.accuracy == pytest.approx((outputs.argmax(1) == data.test.labels).float().mean().item())


@pytest.mark.parametrize(
    ("amp", "alpha", "branch_norm"),
    [
        ("none", None, False),
        ("none", 0.5, False),
        ("none", 0.5, True),
        ("bfloat16", 0.5, False),
        ("bfloat16", 0.5, True),
    ],
)
def test_networks_learn(amp: str, alpha: float | None, branch_norm: bool) -> None:
    """A batch by heart: its loss falls from log 10 to a fraction of it."""
    data = replace(datasets.digits(8, 32), shift=0)
    seed_epoch(0, 0)
    network = models.resnet20(alpha, in_channels=1, branch_norm=branch_norm)
    subject = Learner(network, Recipe(0.05, 0.0, steps=40, amp=amp), ALONE)
    losses = []
    for epoch in range(40):
        for images, labels in training_batches(data, 32, 0, epoch, ALONE):
            subject.step(images, labels)
        losses.append(subject.finish_epoch().loss)
    assert losses[0] > 2
    assert losses[-1] < 0.5, losses


def test_saved_bytes_count_each_storage_once() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    saved = measure.count_saved_bytes(network, torch.rand(5, 1, 2, 2), torch.arange(5) % 3)
    relu, log_softmax, total_weight = 5 * 8 * 4, 5 * 3 * 4, 4
    assert saved == relu + log_softmax + total_weight


def test_macs_leave_the_network_alone() -> None:
    network = models.resnet20(0.5, backend="native")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert measure.count_macs(network, (2, 3, 32, 32)) == 2 * measure.count_macs(network, (1, 3, 32, 32)) > 0
    assert_identical(dict(network.state_dict()), before)
    assert network.training
    assert network.layer1[0].conv1.backend == "native"


def test_timings_take_turns() -> None:
    calls: list[str] = []
    subjects = [lambda: calls.append("a"), lambda: calls.append("b")]
    seconds = measure.interleaved(subjects, ALONE.device, rounds=3, repeats=2, warm_up=1)
    assert "".join(calls) == "ab" + 3 * "aabb"
    assert [len(times) for times in seconds] == [3, 3]
    assert measure.median_ratio([2, 9, 4], [1, 3, 4]) == 2


def log(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        assert record.pop("seconds") > 0
    return records


@pytest.mark.parametrize("alpha", ["none", "1/2"])
def test_resumed_run_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alpha: str) -> None:
    arguments = [*QUICK, "--epochs", "3", "--alpha", alpha]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli.main([*arguments, "--out", str(whole)]) == 0

    steps = 0
    step = Learner.step

    def interrupted(self: Learner, images: Tensor, labels: Tensor) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:  # in the middle of the second epoch
            raise KeyboardInterrupt
        step(self, images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(learner.Learner, "step", interrupted)
        assert cli.main([*arguments, "--out", str(broken)]) == cli.INTERRUPTED
    assert checkpoint.load(broken / "last.pt")["epoch"] == 1
    torch.rand(7)
    assert cli.main([*arguments, "--out", str(broken), "--resume"]) == 0

    for name in ("last.pt", "best.pt"):
        assert_identical(checkpoint.load(broken / name), checkpoint.load(whole / name))
    assert log(broken) == log(whole)
    assert [record["epoch"] for record in log(whole)] == [1, 2, 3]
    assert sorted(os.listdir(broken)) == ["best.pt", "last.pt", "metrics.jsonl"]


def test_the_log_has_a_line_for_each_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a run that ended between a line and its checkpoint; and nobody else's."""
    arguments = [*QUICK, "--epochs", "3", "--alpha", "none"]
    save = checkpoint.save

    def interrupted(path: Path, **content: Any) -> None:
        if content["epoch"] == 2:
            raise KeyboardInterrupt
        save(path, **content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        assert cli.main([*arguments, "--out", str(tmp_path / "one")]) == cli.INTERRUPTED
    assert [record["epoch"] for record in log(tmp_path / "one")] == [1, 2]
    assert cli.main([*arguments, "--out", str(tmp_path / "one"), "--resume"]) == 0
    assert [record["epoch"] for record in log(tmp_path / "one")] == [1, 2, 3]


def test_a_run_is_not_continued_into_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*QUICK, "--epochs", "1", "--alpha", "none"]
    for name in ("one", "other"):
        assert cli.main([*arguments, "--out", str(tmp_path / name)]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    assert cli.main([*arguments, "--out", str(tmp_path / "other"), "--resume", str(tmp_path / "one" / "last.pt")])
    assert "holds a run already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()} == before
    (tmp_path / "other" / "last.pt").unlink()
    assert cli.main([*arguments, "--out", str(tmp_path / "other")]), "its best checkpoint and its log would be lost"


RANK = """
import os, sys
import torch
from spconv_triton.training import cli, loop

class Kept(loop.Learner):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        Kept.network = self.network

loop.Learner = Kept
status = cli.main(sys.argv[2:])
torch.save(Kept.network.state_dict(), f"{sys.argv[1]}/rank{os.environ['RANK']}.pt")
sys.exit(status)
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """torchrun, against two replicas whose gradients are averaged by hand in this process."""
    (tmp_path / "rank.py").write_text(RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "rank.py"]
    out = tmp_path / "out"
    done = subprocess.run(
        [*launch, str(tmp_path), *QUICK, "--epochs", "1", "--out", str(out)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1") == 1, "one process reports"
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_identical(dict(ranks[0]), dict(ranks[1]))

    data = datasets.digits(8, 48)
    replicas = []
    for _ in range(2):
        seed_epoch(0, WEIGHTS)
        replicas.append(Learner(models.resnet20(0.5, in_channels=1), Recipe(0.1, 5e-4, steps=3), ALONE))
    shares = [list(training_batches(data, 16, 0, 0, Processes(rank, 2, ALONE.device))) for rank in range(2)]
    losses = []
    for pair in zip(*shares, strict=True):
        for replica, (images, labels) in zip(replicas, pair, strict=True):
            replica.optimizer.zero_grad()
            loss = F.cross_entropy(replica.network.train()(images), labels)
            loss.backward()
            losses.append(loss.item())
        for parameters in zip(*(r.network.parameters() for r in replicas), strict=True):
            mean = torch.stack([p.grad for p in parameters]).mean(0)
            for parameter in parameters:
                parameter.grad.copy_(mean)
        for replica in replicas:
            replica.optimizer.step()
            replica.scheduler.step()
    torch.testing.assert_close(dict(ranks[0]), dict(replicas[0].network.state_dict()), rtol=1e-3, atol=1e-5)
    (record,) = log(out)
    tested = replicas[0].evaluate(evaluation_batches(data, 64, ALONE))
    assert record["train_loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-4)
    assert record["test_loss"] == pytest.approx(tested.loss, rel=1e-3)
    assert_identical(checkpoint.load(out / "last.pt")["state"]["network"], dict(ranks[0]))
