"""``python -m benchmarks.gpu.child MODULE:FUNCTION FILE [--dry]``: one section, in a process of its own."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

from benchmarks.gpu.record import Record

FAILED = 3
"""How a section ends whose checks failed, and which came to its end: Python itself says 1, and 2 of wrong arguments."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.child")
    parser.add_argument("target")
    parser.add_argument("file", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--untuned", action="store_true")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        importlib.import_module("quick_interpreter").quicken()
    if options.untuned:
        importlib.import_module("benchmarks.gpu.untuned").take()
    module, _, function = options.target.partition(":")
    with Record(options.file, rehearsal=options.dry) as record:
        getattr(importlib.import_module(module), function)(record)
    return FAILED if record.failures else 0


if __name__ == "__main__":
    sys.exit(main())
