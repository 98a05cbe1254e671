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
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

FOLDER = Path(__file__).parent

BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.MULTILINE | re.DOTALL)

SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)

INDENTED = re.compile(r"^ {4}((?:[A-Z_]+=\S+ )?(?:make|git|(?:\.venv/bin/)?(?:python|pytest)) .*)$", re.MULTILINE)

INLINE = re.compile(r"`((?:make|python\s-m|pytest)\s[^`]+)`")


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


def commands(page: Path) -> list[list[str]]:
    """The commands in the page's ``sh`` blocks, indented lines and text, as words, without comments and ``...``."""
    text = page.read_text()
    inline = [" ".join(command.split()) for command in INLINE.findall(text)]
    lines = [*"\n".join(SHELL.findall(text)).splitlines(), *INDENTED.findall(text), *inline]
    split = [[word for word in shlex.split(line, comments=True) if word != "..."] for line in lines]
    return [words for words in split if words]


def run(page: Path, prepare: Callable[[], None] = lambda: None) -> Iterator[tuple[Example, str]]:
    """Run the page's examples in an empty folder, in which ``prepare`` is called first, each with what it prints.

    ``torch.compile`` stops in front of the code generator: what that makes is tested elsewhere, and it takes long.
    """
    namespace: dict[str, Any] = {"__name__": page.stem}
    torch.manual_seed(0)
    fast = functools.partial(torch.compile, backend="aot_eager")
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(torch, "compile", fast):
        os.chdir(folder)
        try:
            prepare()
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
