"""Formulas of floating-point operations for ``torch.utils.flop_counter``, registered when somebody imports it.

It imports triton, which takes longer than all of this package, and few programs count.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"

Formula = Callable[..., int]

_pending: list[tuple[Any, Formula]] = []


def flop_formula(operator: Any) -> Callable[[Formula], Formula]:
    """Decorator as ``torch.utils.flop_counter.register_flop_formula``, which is called when its module is there."""

    def register(formula: Formula) -> Formula:
        _pending.append((operator, formula))
        if COUNTER in sys.modules:
            _register(sys.modules[COUNTER])
        return formula

    return register


def _register(counter: ModuleType) -> None:
    while _pending:
        operator, formula = _pending.pop()
        counter.register_flop_formula(operator)(formula)


class _Finder(MetaPathFinder):
    """Finds the counter's module as the others do, once, and has formulas registered behind its own code."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        if name != COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register(module)


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Finder())
