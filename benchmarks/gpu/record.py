"""What a section finds, written down as it is found."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MESSAGE = 1500
"""Characters of an error that are kept: its end."""


class Record:
    """A file of one JSON object a line, and the same on the screen: nothing is lost with the process.

    Attributes:
        rehearsal: no GPU, tiny sizes, and times that mean nothing.
    """

    def __init__(self, path: Path, *, rehearsal: bool) -> None:
        self.rehearsal = rehearsal
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self.failures = 0

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        with self._lock:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    @contextlib.contextmanager
    def check(self, name: str, alive: Callable[[], object] = lambda: None) -> Iterator[None]:
        """What is done in this context works; if it does not, that is written down and the section goes on.

        Args:
            alive: is called after a failure. If it raises, the device is lost, and with it the rest of the section.
        """
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            said = isinstance(error, AssertionError) and str(error)
            self.failed(name, str(error) if said else traceback.format_exc(), time.perf_counter() - start)
            alive()
        else:
            seconds = time.perf_counter() - start
            self.passed(name, seconds)
            print(f"ok {name} ({seconds:.1f} s)", flush=True)

    def passed(self, name: str, seconds: float | None = None) -> None:
        """A check that was made elsewhere."""
        self._write({"check": name, "passed": True, "seconds": seconds})

    def failed(self, name: str, message: str, seconds: float | None = None) -> None:
        """Likewise; the end of a long message is kept."""
        self.failures += 1
        message = message.strip()[-MESSAGE:]
        self._write({"check": name, "passed": False, "seconds": seconds, "message": message})
        print(f"FAILED {name}: {message.splitlines()[-1]}", flush=True)

    def row(self, table: str, **values: Any) -> None:
        """A line of a table of results."""
        self._write({"row": table, **values})
        print(f"{table}:", ", ".join(f"{name} {_short(value)}" for name, value in values.items()), flush=True)

    def note(self, text: str) -> None:
        """What a reader of the report should know."""
        self._write({"note": text})
        print(text, flush=True)

    def needs_gpu(self, what: str) -> None:
        """``what`` is left out of a rehearsal."""
        self.note(f"needs a GPU: {what}")

    def skip(self, reason: str) -> None:
        """The section cannot run here, and that is no failure."""
        self._write({"skipped": reason})
        print(f"not run: {reason}", flush=True)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "/".join(map(_short, value))
    return str(value)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a record's file, but for a last one that was cut short."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
