"""Python code in a process of its own, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_python(code: str, cwd: Path, *args: str | Path, **environment: str) -> str:
    """What ``code`` prints.

    Args:
        cwd: where it runs; not the checkout, whose folders would be importable.
        args: its ``sys.argv[1:]``.
        environment: set on top of this process's, less the variables that change what Python or Triton do.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=cwd,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
