"""Writing what was measured."""

from __future__ import annotations

from pathlib import Path

from spconv_triton.training.files import make_folder, write_whole


def write(path: Path, text: str) -> None:
    """Write a text file, whole or not at all, in a folder that is made if it is missing.

    Raises:
        spconv_triton.training.errors.UserError: it cannot be written.
    """
    make_folder(path.parent)
    write_whole(path, text.encode())
