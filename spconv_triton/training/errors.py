"""What may go wrong through no fault of the program, and is told in one line."""

from __future__ import annotations

import importlib
from typing import Any


class UserError(Exception):
    """Bad input, or a machine that cannot do what was asked: one line, no traceback, exit status 2."""


def need(module: str, purpose: str) -> Any:
    """The optional dependency ``module``, imported.

    Raises:
        UserError: it is not installed; the message says which command installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = {"sklearn": "scikit-learn"}.get(module.split(".")[0], module.split(".")[0])
        raise UserError(f"{purpose} needs {name} ({error}): pip install 'split-conv-triton[train]'") from error
