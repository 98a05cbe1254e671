"""How a module's forward uses its parts, as far as its source says."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import fx, nn

WHOLE = ("children", "modules", "named_children", "named_modules", "_modules", "get_submodule")
"""Attributes of a module by which it may reach any part."""


class Uses(NamedTuple):
    """What the methods that forward leads to do with attributes.

    Attributes:
        touched: names of attributes that are looked at, and not only called or compared with None.
        any_part: whether parts are reached by no name of theirs.
        asked: arguments of forward without a default that are compared with None.
        asks_type: whether ``type(...)`` of anything but ``self`` is called, which a symbol does not notice.
    """

    touched: frozenset[str]
    any_part: bool
    asked: frozenset[str]
    asks_type: bool


def only_calls(parent: nn.Module, part: str, *, unknown: bool) -> bool:
    """Whether the forward of ``parent`` does nothing with its child ``part`` but call it.

    Elements of containers count as called.

    Args:
        unknown: the answer where there is no source.
    """
    if isinstance(parent, (fx.GraphModule, nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return True
    if type(parent).__module__.startswith("torch.nn."):
        return True
    uses = uses_of(type(parent))  # type: ignore[arg-type]  # whose hash mypy does not see
    return unknown if uses is None else not (uses.any_part or part in uses.touched)


def is_only_called(part: nn.Module, model: nn.Module) -> bool:
    """Whether no forward in ``model`` is known to do more with ``part``, a child of some module, than call it."""
    children = ((parent, key) for parent in model.modules() for key, child in parent.named_children() if child is part)
    return all(only_calls(parent, key, unknown=True) for parent, key in children)


def asks_for_none(module: nn.Module) -> bool:
    """Whether the forward of ``module`` asks if an argument that must be given is None."""
    uses = uses_of(type(module))  # type: ignore[arg-type]
    return uses is not None and bool(uses.asked)


def asks_for_type(module: nn.Module) -> bool:
    """Whether the forward of ``module`` takes the type of something else than the module."""
    if type(module).__module__.startswith("torch.nn."):
        return False
    uses = uses_of(type(module))  # type: ignore[arg-type]
    return uses is not None and uses.asks_type


@functools.lru_cache(maxsize=1024)
def uses_of(kind: Any) -> Uses | None:
    """What a class does; None without its source."""
    methods: dict[str, list[ast.FunctionDef]] = {}
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            return None
        for definition in ast.walk(tree):
            if isinstance(definition, ast.FunctionDef):
                methods.setdefault(definition.name, []).append(definition)
    touched: set[str] = set()
    asks_type = False
    for method in _reached(methods):
        touched |= set(_touched(method))
        asks_type |= any(map(_is_type_of_another, ast.walk(method)))
    return Uses(frozenset(touched), not touched.isdisjoint(WHOLE), frozenset(_asked(methods)), asks_type)


def _reached(methods: dict[str, list[ast.FunctionDef]]) -> Iterator[ast.FunctionDef]:
    """The definitions that forward leads to, by name."""
    pending, seen = ["forward"], {"forward"}
    while pending:
        for method in methods.get(pending.pop(), []):
            yield method
            named = {node.attr for node in ast.walk(method) if isinstance(node, ast.Attribute)}
            pending += named - seen
            seen |= named
            if not any(isinstance(node, ast.Name) and node.id == "super" for node in ast.walk(method)):
                break  # those of the classes above are not called


def _touched(method: ast.FunctionDef) -> Iterator[str]:
    harmless: set[ast.AST] = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Attribute) and node.func.attr in WHOLE):
            harmless.add(node.func)
        elif isinstance(node, ast.Compare) and _is_with_none(node):
            harmless.add(node.left)
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node not in harmless:
            yield node.attr


def _asked(methods: dict[str, list[ast.FunctionDef]]) -> Iterator[str]:
    for forward in methods.get("forward", [])[:1]:
        arguments = forward.args.args[1 : len(forward.args.args) - len(forward.args.defaults)]
        names = {argument.arg for argument in arguments}
        for node in ast.walk(forward):
            if isinstance(node, ast.Compare) and _is_with_none(node) and isinstance(node.left, ast.Name):
                yield from names & {node.left.id}


def _is_type_of_another(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type"):
        return False
    return len(node.args) == 1 and not (isinstance(node.args[0], ast.Name) and node.args[0].id == "self")


def _is_with_none(node: ast.Compare) -> bool:
    operands = node.comparators
    is_none = len(operands) == 1 and isinstance(operands[0], ast.Constant) and operands[0].value is None
    return is_none and isinstance(node.ops[0], (ast.Is, ast.IsNot))
