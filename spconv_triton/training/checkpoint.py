"""Checkpoints: written whole or not at all, and read without trusting them."""

from __future__ import annotations

import warnings
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .files import write_whole

FORMAT = "spconv_triton checkpoint 2"
KEYS = {"format", "settings", "epoch", "best", "state"}


def save(path: Path, *, settings: dict[str, Any], epoch: int, best: float, state: dict[str, Any]) -> None:
    """Write a checkpoint; on any failure ``path`` stays what it was.

    Args:
        settings: what the run was asked for, plain values only.
        epoch: epochs done.
        best: best test accuracy so far, 0 to 1.
        state: of the learner.

    Raises:
        UserError: it cannot be written.
    """
    buffer = BytesIO()
    torch.save({"format": FORMAT, "settings": settings, "epoch": epoch, "best": best, "state": state}, buffer)
    write_whole(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; checksums are verified, and no code in it can run.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint of this program.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"the checkpoint {path} is damaged: wrong checksum in {damaged}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # what a broken archive raises is not specified
        raise UserError(f"{path} is damaged or not a checkpoint of spconv_triton") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not content.keys() >= KEYS:
        raise UserError(f"{path} is not a checkpoint of spconv_triton (its format must be {FORMAT!r})")
    return content
