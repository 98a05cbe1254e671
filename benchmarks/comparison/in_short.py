"""``python -m benchmarks.comparison.in_short``: what REPORT.md comes to, in lines that the README has too.

Read from the page's own tables, so that nothing is said that they do not say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.competitors import DIRECTIONS
from benchmarks.markdown import table
from benchmarks.peers import NAMES, NETWORKS, TITLES
from benchmarks.peers.catalogue import VARIANTS

PAGE = Path(__file__).parents[1] / "REPORT.md"

WAYS = ("spconv", "spconv kept", "spconv compiled", "conv2d compiled")
"""SPConv, and what its compiled layers should be set against too."""

COUNTED = ("resnet50", "vgg16")
"""Networks whose layers are counted one by one; those of ResNet-20 are calls more than products."""

ACCURATE = ("nn.Conv2d", "SPConv, alpha 1/2", "SPConv, alpha 1/4", "SPConv, alpha 1/8")

Speeds = dict[tuple[str, str], dict[str, dict[tuple[str, int], float]]]
"""By network and direction, name, layer and batch: the median speed, nn.Conv2d's in eager mode being 1."""


def in_short(page: str) -> list[str]:
    """Lines of Markdown; none of a page without float32 layers.

    Args:
        page: the text of REPORT.md, with these lines or without.
    """
    speeds = _speeds(page)
    if not speeds:
        return []
    lines = [
        "Speeds of layers in float32 from the slowest to the fastest, eager `nn.Conv2d` = 1:",
        "",
        *_ranges(speeds),
    ]
    if counts := _counts(page, speeds):
        networks = " and ".join(network for network in COUNTED if (network, DIRECTIONS[0]) in speeds)
        lines += [
            "",
            f"In how many layers of {networks} each is faster than SPConv, all batches together:",
            "",
            *counts,
        ]
    accuracies = {cells[0]: cells[1] for head, rows in _tables(page) if "test accuracy (%)" in head for cells in rows}
    if accuracies:
        said = ", ".join(f"{title} {accuracies[title]}" for title in ACCURATE if title in accuracies)
        lines += ["", f"Test accuracy on the digits in %: {said}."]
    return lines


def _ranges(speeds: Speeds) -> list[str]:
    batches = sorted({batch for names in speeds.values() for cells in names.values() for _, batch in cells})
    body = []
    for (network, direction), names in speeds.items():
        for way in WAYS:
            found = [[speed for (_, b), speed in names.get(way, {}).items() if b == batch] for batch in batches]
            if any(found):
                cells = (f"{min(own):.2f} to {max(own):.2f}" if own else "" for own in found)
                body.append((network, direction, TITLES[way], *cells))
    return table(("layers of", "direction", "", *(f"N = {batch}" for batch in batches)), body, words=3)


def _counts(page: str, speeds: Speeds) -> list[str]:
    """A line for each competitor that runs everywhere."""
    macs = {cells[0]: cells[1] for head, rows in _tables(page) if "MACs, nn.Conv2d / own" in head for cells in rows}
    body = []
    for name in NAMES:
        if name == "spconv" or name.endswith(VARIANTS):
            continue
        cells = []
        for direction in DIRECTIONS:
            pairs = [
                (found[name].get(key), own)
                for network in COUNTED
                if "spconv" in (found := speeds.get((network, direction), {})) and name in found
                for key, own in found["spconv"].items()
            ]
            faster = sum(theirs is not None and theirs > own for theirs, own in pairs)
            cells.append(f"{faster} of {len(pairs)}" if pairs else "")
        if any(cells):
            body.append((TITLES[name], macs.get(TITLES[name], ""), *cells))
    return table(("", "MACs, nn.Conv2d / own", *DIRECTIONS), body) if body else []


def _speeds(page: str) -> Speeds:
    """From the tables under headings such as ``### resnet50, float32, forward``."""
    names = {title: name for name, title in TITLES.items()}
    found: Speeds = {}
    for network in NETWORKS:
        for direction in DIRECTIONS:
            _, heading, rest = page.partition(f"\n### {network}, float32, {direction}\n")
            if not heading:
                continue
            head, rows = next(_tables(rest))
            own = found.setdefault((network, direction), {"conv2d": {}})
            for layer, batch, _, *cells in rows:
                own["conv2d"][layer, int(batch)] = 1.0
                for title, cell in zip(head[3:], cells, strict=True):
                    if cell:
                        own.setdefault(names[title], {})[layer, int(batch)] = float(cell.partition(" ")[0])
    return found


def _tables(page: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Head and rows of each table."""
    for block in re.findall(r"(?:^\|.*\n?)+", page, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines())
        yield head, rows


if __name__ == "__main__":
    print("\n".join(in_short(PAGE.read_text())))
