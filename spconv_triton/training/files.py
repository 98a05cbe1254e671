"""Writing files so that a full disk or a Ctrl-C leaves nothing half-written."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

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
    """Replace ``path`` by ``content``, or leave it as it was.

    The content goes to a temporary file in the same folder, reaches the disk, and then takes the name of ``path``.

    Raises:
        UserError: it cannot be written; the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
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
