"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int | None = 1) -> list[str]:
    """Lines of a table; all columns but the first ``words`` are numbers, aligned to the right; none for None."""
    rule = "".join("|---" if words is None or i < words else "|---:" for i in range(len(head))) + "|"
    return [_line(head), rule, *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
