"""torchrun on CPUs: DDP and FSDP2 train as one process does, and a killed job is taken up by another number of them.

The networks compute in float64 and normalise each sample by itself, so that what is left of a difference between
numbers of processes is the loss, which is rounded to float32. Batch norms would see another batch in each process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from spconv_triton import models
from spconv_triton.training import checkpoint, cli, datasets, loop
from spconv_triton.training.data import IGNORED, evaluation_batches, training_batches
from spconv_triton.training.learner import Learner
from spconv_triton.training.processes import Processes
from spconv_triton.training.sharding import blocks

CPU = torch.device("cpu")
EPOCHS, STEPS = 3, 4
RUN = ("train", "--samples", "48", "--batch-size", "12", "--epochs", str(EPOCHS), "--image-size", "8", "--lr", "0.02")
RUN = (*RUN, "--no-branch-norm", "--device", "cpu", "--threads", "1")

ROUNDINGS = 1e-5
"""Relative: 12 steps on losses rounded to float32 (6e-8), whose errors a step of training enlarges a little."""

WORKER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_distributed as ours
from spconv_triton.training import cli, learner, loop

rank, steps, step = int(os.environ["RANK"]), 0, learner.Learner.step
killed, at = int(sys.argv[2]), int(sys.argv[3])

def perilous(self, images, labels):
    global steps
    steps += 1
    if rank == killed and steps == at:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, images, labels)

learner.Learner.step = perilous
loop.build = ours.build_normed_by_sample
sys.exit(cli.main(sys.argv[4:]))
"""

build = loop.build


class Float64(nn.Module):
    """A network that computes in float64 on any input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.double())


def build_normed_by_sample(*arguments: Any) -> nn.Module:
    """What ``loop.build`` makes, with group norms in place of batch norms, in float64."""
    network = build(*arguments)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(4, child.num_features))
    return Float64(network)


@pytest.fixture(autouse=True)
def normed_by_sample(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(loop, "build", build_normed_by_sample)
    yield
    torch.set_num_threads(before)


def torchrun(world: int, folder: Path, *arguments: str, kill: tuple[int, int] = (-1, 0)) -> subprocess.CompletedProcess:
    """``python -m spconv_triton`` in ``world`` processes; ``kill`` is (rank, step) of a SIGKILL before that step."""
    script = folder / "worker.py"
    script.write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return subprocess.run(
        [*launch, str(script), str(Path(__file__).parent), *map(str, kill), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def flatten(state: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(state, (dict, list)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in items for k, v in flatten(value, f"{prefix}/{key}").items()}
    return {prefix: state}


def assert_same_run(ours: Path, theirs: Path, epochs: int = EPOCHS) -> None:
    """The logs and last checkpoints of two runs agree within rounding."""
    records = log(ours)[:epochs], log(theirs)[:epochs]
    assert [[record["epoch"] for record in lines] for lines in records] == 2 * [list(range(1, epochs + 1))]
    for one, other in zip(*records, strict=True):
        for name in ("train_loss", "test_loss"):
            assert one[name] == pytest.approx(other[name], rel=ROUNDINGS), f"{name} of epoch {one['epoch']}"
        for name in ("lr", "train_accuracy", "test_accuracy"):
            assert one[name] == other[name], f"{name} of epoch {one['epoch']}"
    states = [flatten(checkpoint.load(folder / "last.pt")["state"]) for folder in (ours, theirs)]
    if epochs < EPOCHS:
        return
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        if not isinstance(value, Tensor):
            assert value == states[1][key], key
            continue
        assert type(value) is Tensor, f"{key} is a {type(value)}: no other number of processes could load it"
        error = (value - states[1][key]).abs().max()
        assert error <= ROUNDINGS * states[1][key].abs().max(), f"{key} differs by {error}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, uninterrupted."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build", build_normed_by_sample)
        assert cli.main([*RUN, "--out", str(out)]) == 0
    assert log(out)[-1]["train_loss"] < 0.9 * log(out)[0]["train_loss"], "nothing is learnt, so nothing is compared"
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "killed", "heirs"), [("ddp", 1, 3), ("fsdp", 0, 1)])
def test_a_killed_worker_ends_the_job_and_others_go_on(
    tmp_path: Path, alone: Path, parallel: str, killed: int, heirs: int
) -> None:
    """A worker dies in the third epoch; another number of processes ends the run as one would have."""
    out = tmp_path / "out"
    arguments = [*RUN, "--out", str(out)]
    died = torchrun(2, tmp_path, *arguments, "--parallel", parallel, kill=(killed, 2 * STEPS + 2))
    assert died.returncode != 0
    assert "Signal 9 (SIGKILL) received by PID" in died.stderr, died.stderr
    assert died.stdout.count("2 processes") == 1, "one process reports"
    assert checkpoint.load(out / "last.pt")["epoch"] == 2
    assert_same_run(out, alone, epochs=2)

    if heirs == 1:
        assert cli.main([*arguments, "--resume"]) == 0
    else:
        done = torchrun(heirs, tmp_path, *arguments, "--resume", "--parallel", "fsdp")
        assert done.returncode == 0, done.stderr
        assert f"going on after epoch 2 of {out / 'last.pt'}" in done.stdout
    assert_same_run(out, alone)
    assert sorted(os.listdir(out)) == ["best.pt", "last.pt", "metrics.jsonl"]


@pytest.mark.slow
def test_ddp_takes_up_what_one_process_began(tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = Learner.step, 0

    def interrupted(self: Learner, images: Tensor, labels: Tensor) -> None:
        nonlocal steps
        steps += 1
        if steps == STEPS + 2:
            raise KeyboardInterrupt
        step(self, images, labels)

    arguments = [*RUN, "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", interrupted)
        assert cli.main(arguments) == cli.INTERRUPTED
    done = torchrun(2, tmp_path, *arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "out", alone)


@pytest.mark.parametrize("world", [2, 3])
def test_a_batch_is_the_same_for_any_number_of_processes(world: int) -> None:
    """Images, augmentation and order."""
    data = datasets.digits(8, 50)
    assert data.shift, "nothing is drawn"
    whole = list(training_batches(data, 12, 0, 5, Processes(0, 1, CPU)))
    shares = [list(training_batches(data, 12, 0, 5, Processes(rank, world, CPU))) for rank in range(world)]
    assert [len(share) for share in shares] == world * [len(whole)]
    for step, (images, labels) in enumerate(whole):
        for rank, share in enumerate(shares):
            assert torch.equal(share[step][0], images[rank::world])
            assert torch.equal(share[step][1], labels[rank::world])


@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (9, 3), (7, 2), (2, 4)])
def test_processes_evaluate_as_many_batches(count: int, batch_size: int) -> None:
    """However the images fall; each image is counted once."""
    data = datasets.digits(8, 12)
    data.test.images, data.test.labels = data.test.images[:count], torch.arange(count)
    shares = [list(evaluation_batches(data, batch_size, Processes(rank, 3, CPU))) for rank in range(3)]
    sizes = [[len(images) for images, _ in share] for share in shares]
    assert sizes[0] == sizes[1] == sizes[2]
    labels = [label for share in shares for _, labels in share for label in labels.tolist()]
    assert sorted(label for label in labels if label != IGNORED) == list(range(count))
    assert labels.count(IGNORED) == -count % 3
    assert data.test.labels.tolist() == list(range(count)), "the data set was written to"


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_a_network_is_gathered_in_blocks(name: str) -> None:
    with torch.device("meta"):
        network = models.MODELS[name](0.5)
    total = sum(p.numel() for p in network.parameters())
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(network)]
    assert len(sizes) > 8
    assert total / 2 < sum(sizes) <= total, "most is in blocks, nothing twice"


def test_no_process_group_is_left_behind(alone: Path) -> None:
    assert (alone / "last.pt").exists()
    assert not dist.is_initialized()
