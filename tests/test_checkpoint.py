"""Files are whole or as they were; what is read is not trusted."""

from __future__ import annotations

import errno
import os
import pickle
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from spconv_triton.training import checkpoint, files
from spconv_triton.training.errors import UserError


def save(path: Path, epoch: int = 1) -> None:
    state = {"network": {"weight": torch.arange(64.0)}}
    checkpoint.save(path, settings={"seed": 3}, epoch=epoch, best=0.5, state=state)


def no_space(*_args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path / "last.pt", epoch=7)
    content = checkpoint.load(tmp_path / "last.pt")
    assert (content["epoch"], content["best"], content["settings"]) == (7, 0.5, {"seed": 3})
    assert torch.equal(content["state"]["network"]["weight"], torch.arange(64.0))
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "last.pt"
    save(path, epoch=1)
    before = path.read_bytes()
    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(UserError, match=r"cannot write .*last\.pt: No space left on device"):
        save(path, epoch=2)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_device(tmp_path: Path) -> None:
    """A device that is really full: the write itself fails, not a stand-in for it."""
    path = tmp_path / "last.pt"
    save(path, epoch=1)
    before = path.read_bytes()
    (tmp_path / f".last.pt.{os.getpid()}.{threading.get_ident()}").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device"):
        save(path, epoch=2)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device"):
        files.append_line(tmp_path / "metrics.jsonl", "{}")


def test_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    save(path, epoch=1)
    before = path.read_bytes()

    def interrupt(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(path, epoch=2)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*: No such file or directory"):
        save(tmp_path / "nowhere" / "last.pt")
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*: No such file or directory"):
        checkpoint.load(tmp_path / "last.pt")


@pytest.mark.parametrize("share", [0, 0.3, 0.999])
def test_truncated(tmp_path: Path, share: float) -> None:
    path = tmp_path / "last.pt"
    save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        checkpoint.load(path)


def test_one_wrong_bit(tmp_path: Path) -> None:
    """PyTorch's own reader does not verify checksums: it would load another weight."""
    path = tmp_path / "last.pt"
    save(path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(64.0).numpy().tobytes()) + 130] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["state"]["network"]["weight"][32] != 32
    with pytest.raises(UserError, match=r"damaged: wrong checksum in .*data"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", [{"weight": torch.ones(2)}, [1, 2], {"format": "another", "epoch": 1}])
def test_foreign_checkpoint(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="is not a checkpoint of spconv_triton"):
        checkpoint.load(tmp_path / "foreign.pt")


class Trap:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_in_a_checkpoint_runs(tmp_path: Path, zipped: bool) -> None:
    sprung = tmp_path / "sprung"
    path = tmp_path / "trap.pt"
    if zipped:
        torch.save({"format": checkpoint.FORMAT, "trap": Trap(sprung)}, path)
        assert zipfile.is_zipfile(path)
    else:
        path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        checkpoint.load(path)
    assert not sprung.exists()


def test_a_log_line_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    files.append_line(path, "first")
    real_open = open

    def almost_full(*args: object, **kwargs: object) -> object:
        file = real_open(*args, **kwargs)

        class Short:
            def __enter__(self) -> Short:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, content: bytes) -> int:
                return file.write(content[:3])  # the disk takes three bytes more

            tell, truncate = file.tell, file.truncate

        return Short()

    monkeypatch.setattr("builtins.open", almost_full)
    with pytest.raises(UserError, match="No space left on device"):
        files.append_line(path, "second")
    monkeypatch.undo()
    assert path.read_text() == "first\n"
    files.append_line(path, "third")
    assert path.read_text() == "first\nthird\n"
