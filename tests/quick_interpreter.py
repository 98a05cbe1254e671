"""Triton's interpreter without what it does again and again to no effect here: more than half of its time.

A plug-in of pytest, too: ``-p quick_interpreter``. What is not found in a version of Triton is left as it is.

- Before every call of a device function it looks through the language for what to replace, though the kernel that
  calls it has had all of that replaced.
- It makes every sum and product of integers again with 64 bits, to find out whether it overflows, and unless it is
  told to debug does nothing with the answer. Tests with large offsets ask for it (:func:`overflow_checks`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """From now on, in this process."""
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _Once(interpreter._patch_lang)
    _check_overflow(False)


class _Once:
    """``_patch_lang`` that replaces nothing while the same modules' functions are replaced already."""

    def __init__(self, patch: Any) -> None:
        self.patch = patch
        self.patched: set[Any] = set()

    def __call__(self, function: Any) -> Any:
        used = {value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)}
        if used <= self.patched:
            return interpreter._LangPatchScope()
        scope = self.patch(function)
        before, restore = self.patched, scope.restore
        self.patched = before | used

        def restored() -> None:
            self.patched = before
            restore()

        scope.restore = restored
        return scope


@contextlib.contextmanager
def overflow_checks() -> Iterator[None]:
    """Sums and products of integers that overflow are errors."""
    _check_overflow(True)
    try:
        yield
    finally:
        _check_overflow(False)


def _check_overflow(wanted: bool) -> None:
    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=wanted, debug=wanted)
