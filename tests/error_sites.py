"""Where the package raises: every ``raise`` of an exception that callers see, found in the sources."""

from __future__ import annotations

import ast
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from error_cases import PACKAGE

OTHERS = ("AttributeError", "OSError", "UndecidedError")
"""Python's own, for a missing name and a full disk, and what ``fuse`` catches itself."""

TOLD = ("UserError", "argparse.ArgumentTypeError")
"""What the command line tells in one line. Nothing else that ``training`` raises reaches anybody."""


@dataclass(frozen=True, order=True)
class Site:
    """One ``raise`` statement.

    Attributes:
        file: relative to the package.
        first, last: its lines.
        text: its source.
    """

    file: str
    first: int
    last: int
    text: str


def find_sites() -> list[Site]:
    """The package's, in the order of files and lines."""
    return [site for path in sorted(PACKAGE.rglob("*.py")) for site in _sites_in(path)]


def sites_of(error: BaseException, sites: list[Site]) -> list[Site]:
    """Those which raised ``error`` and, before it, what was being handled then."""
    found = []
    while error is not None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        path = Path(frame.filename)
        name = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else ""
        found += [s for s in sites if s.file == name and s.first <= (frame.lineno or 0) <= s.last]
        error = error.__context__
    return found


def _sites_in(path: Path) -> Iterator[Site]:
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            file, kind = path.relative_to(PACKAGE).as_posix(), ast.unparse(node.exc.func)
            if kind not in OTHERS and (kind in TOLD or not file.startswith("training/")):
                yield Site(file, node.lineno, node.end_lineno or node.lineno, ast.unparse(node.exc))
