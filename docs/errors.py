"""docs/errors.md, written from the tests' list of mistakes: ``python -m docs.errors``."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from error_cases import CASES, PREAMBLE, Case
from error_commands import COMMANDS, SMALL, Command
from error_sites import Site, find_sites, sites_of

from spconv_triton.training.cli import PROGRAM

PAGE = Path(__file__).with_name("errors.md")

SECTIONS = {
    "Words, flags and counts": ("arguments.py", "channels.py"),
    "Shapes, dtypes and devices": ("checks.py", "functional.py"),
    "Windows and groups": ("geometry.py",),
    "Layers": ("modules.py", "fused.py", "branch_norm.py"),
    "Backends and tuning": ("dispatch.py", "explanation.py", "tuning.py", "launch/common.py"),
    "Networks": ("conversion.py", "surgery.py", "network_summary.py", "fusing/entry.py", "checkpoints.py"),
}
"""The sources whose messages each holds."""

FOREIGN = re.compile(
    "(checkpoint must be readable with weights_only=True, got 'model.pth': |cannot read the image |--data: Found "
    "|needs scikit-learn ).*",
    re.DOTALL,
)
"""Messages that go on in the words of other libraries, which differ from version to version."""

INTRODUCTION = """\
# Errors

A bad argument fails at the call, before anything is read or computed, with a message that names the argument, what came
and what is legal. Types are wrong with a `TypeError`, values with a `ValueError`. What PyTorch itself raises, and
files that cannot be opened, pass through.

Every message that the library has is below, once, with a call that brings it about and the others that do. The tests
run all of these calls and write this page from what they raise (`python -m docs.errors`). Inside `torch.compile` the
same exceptions come out, and with `fullgraph=True` their text is in the error of the compiler; the tests show that too.

The examples begin with:

```python
"""


COMMAND_LINE = """\
## Command line

`python -m spconv_triton` tells what is wrong in one line and ends with status 2. Files that were there stay. What
only makes a run short is left out of these commands.
"""


def page() -> str:
    """The text of the page. It runs every case."""
    examples = _examples()
    parts = [INTRODUCTION + PREAMBLE + "```\n"]
    for title, files in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts += [_entry(found) for site, found in sorted(examples.items()) if site.file in files]
    parts.append(COMMAND_LINE)
    parts += [_line(command) for command in COMMANDS]
    return "\n".join(parts)


def _line(command: Command) -> str:
    where = f"  # {command.where}" if command.where else ""
    _, line = command.provoke()
    told = FOREIGN.sub(r"\1...", line).replace("loss is inf", "loss is nan")  # whichever comes first
    arguments = command.arguments.replace(f" {SMALL}", "")
    return f"```console\n$ {PROGRAM} {arguments}{where}\n{told}\n```\n"


def _examples() -> dict[Site, list[tuple[Case, str]]]:
    """The cases that end at each ``raise`` statement, with their messages."""
    sites = find_sites()
    examples: dict[Site, list[tuple[Case, str]]] = {}
    for case in CASES:
        error = case.provoke()
        found = sites_of(error, sites)
        examples.setdefault(found[0], []).append((case, FOREIGN.sub(r"\1...", str(error))))
    return examples


def _entry(found: list[tuple[Case, str]]) -> str:
    case, message = found[0]
    others = [f"`{name}`" for name in dict.fromkeys(c.call for c, _ in found) if name != case.call]
    code = case.code if '"' in case.code else case.code.replace("'", '"')  # as the formatter would have it
    lines = [f">>> {line}" for line in code.split("; ")]
    if case.circumstances:
        lines[-1] += f"  # {case.circumstances}"
    block = "\n".join(["```pycon", *lines, f"{case.error.__name__}: {message}", "```", ""])
    return block + (f"\nThe same from {', '.join(others)}.\n" if others else "")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # of a tracer, which is to be refused
    PAGE.write_text(page())
