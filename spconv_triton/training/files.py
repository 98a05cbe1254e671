"""Folders and files of a run: what cannot be written is a message, and nothing is left half-written."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from .. import files
from .errors import UserError


def make_folder(folder: Path) -> None:
    """Create ``folder`` and its parents where they are missing.

    Raises:
        UserError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {folder}: {error.strerror}") from error


def write_whole(path: Path, content: bytes) -> None:
    """:func:`spconv_triton.files.write_whole`, for people.

    Raises:
        UserError: it cannot be written; the temporary file is gone.
    """
    try:
        files.write_whole(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def append_line(path: Path, line: str) -> None:
    """Add one line at the end of ``path``, or leave it as it was.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with open(path, "ab", buffering=0) as file:
            end = file.tell()
            content = line.encode() + b"\n"
            try:
                if file.write(content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except BaseException:
                with suppress(OSError):
                    file.truncate(end)
                raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
