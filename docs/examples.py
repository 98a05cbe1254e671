"""Running the pages' examples: ``python -m docs.examples PAGE`` prints what each prints.

A fenced ``python`` block is run in its page's namespace, after the blocks above it. A ``text`` block right behind it is
what it prints, in which ``...`` stands for anything.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

FOLDER = Path(__file__).parent

BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.MULTILINE | re.DOTALL)

SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    """A block of a page.

    Attributes:
        line: where it begins.
        code: Python.
        output: what the page says that it prints.
    """

    line: int
    code: str
    output: str


def pages() -> list[Path]:
    """Those with examples that run as they stand; the page of errors has its own tests."""
    return [page for page in sorted(FOLDER.glob("*.md")) if page.name != "errors.md"]


def examples(page: Path) -> list[Example]:
    """The page's, in order."""
    text = page.read_text()
    return [
        Example(text.count("\n", 0, m.start()) + 1, m["code"], (m["output"] or "").rstrip())
        for m in BLOCK.finditer(text)
    ]


def commands(page: Path) -> list[str]:
    """The lines of the page's ``sh`` blocks, without comments."""
    lines = "\n".join(SHELL.findall(page.read_text())).splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]


def run(page: Path) -> Iterator[tuple[Example, str]]:
    """Run the page's examples in an empty folder, each with what it prints.

    ``torch.compile`` stops in front of the code generator: what that makes is tested elsewhere, and it takes long.
    """
    namespace: dict[str, Any] = {"__name__": page.stem}
    torch.manual_seed(0)
    fast = functools.partial(torch.compile, backend="aot_eager")
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(torch, "compile", fast):
        os.chdir(folder)
        try:
            for example in examples(page):
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile("\n" * example.line + example.code, str(page), "exec"), namespace)
                yield example, printed.getvalue().rstrip()
        finally:
            os.chdir(before)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for example, printed in run(FOLDER / name):
            print(f"--- {name}:{example.line}", printed, sep="\n")
