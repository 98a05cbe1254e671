"""What a traced forward does to its modules, noted and undone."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Changes:
    """What a forward did to its modules while it was traced.

    Attributes:
        attributes: those on which it set some.
        contents: those into whose lists and dictionaries it put something.
        state: those on which it set a number, a flag or a text to another, which its next call may go by.
    """

    attributes: list[nn.Module] = field(default_factory=list)
    contents: list[nn.Module] = field(default_factory=list)
    state: list[nn.Module] = field(default_factory=list)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[Changes]:
    """Put back what a traced forward changes about its modules, to symbols most likely, and note it."""
    before = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
    changes = Changes()
    try:
        yield changes
    finally:
        for module, attributes, contents in before:
            if not _are_the_same(vars(module), attributes):
                changes.attributes.append(module)
            if any(_is_plain(value) and value != attributes.get(name) for name, value in vars(module).items()):
                changes.state.append(module)
            if not all(_are_the_same(attributes[name], was) for name, was in contents.items()):
                changes.contents.append(module)
            vars(module).clear()
            vars(module).update(attributes)
            for name, was in contents.items():
                if isinstance(was, list):
                    attributes[name][:] = was
                else:
                    attributes[name].clear()
                    attributes[name].update(was)


def _contents(module: nn.Module) -> dict[str, Any]:
    """Copies of the lists and dictionaries that are attributes, those of its parts and parameters among them."""
    kept = (list, dict)
    return {name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, kept)}


def _is_plain(value: Any) -> bool:
    return type(value) in (bool, int, float, str)


def _are_the_same(now: Any, was: Any) -> bool:
    """Whether two lists or dictionaries hold the same objects."""
    if isinstance(was, dict):
        return now.keys() == was.keys() and all(now[key] is was[key] for key in was)
    return len(now) == len(was) and all(map(operator.is_, now, was))
