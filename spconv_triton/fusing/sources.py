"""How a module's forward uses its parts, as far as its source says."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

from torch import fx, nn

WHOLE = ("apply", "children", "modules", "named_children", "named_modules", "_modules", "get_submodule", "__dict__")
"""Attributes of a module by which it may reach any part."""


class Method(NamedTuple):
    """One that a forward leads to.

    Attributes:
        tree: its definition.
        instance: the name of its first argument; empty if that is no instance.
    """

    tree: ast.FunctionDef
    instance: str


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


def is_only_called(part: nn.Module, parents: Iterable[nn.Module]) -> bool:
    """Whether no forward of ``parents``, all of which can be traced, is known to do more with ``part`` than call it."""
    children = ((parent, key) for parent in parents for key, child in parent._modules.items() if child is part)
    return all(only_calls(parent, key) for parent, key in children)


def only_calls(parent: nn.Module, part: str) -> bool:
    """Whether the forward of ``parent``, which can be traced, does nothing with its child ``part`` but call it, as far
    as is known. Elements of containers count as called."""
    if isinstance(parent, (fx.GraphModule, nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return True
    uses = uses_of(type(parent))
    return uses is None or not (uses.any_part or part in uses.touched)


def asks_for_none(module: nn.Module) -> bool:
    """Whether the forward of ``module`` asks if an argument that must be given is None."""
    uses = uses_of(type(module))
    return uses is not None and bool(uses.asked)


def asks_for_type(module: nn.Module) -> bool:
    """Whether the forward of ``module`` takes the type of something else than the module."""
    if type(module).__module__.startswith("torch.nn."):
        return False
    uses = uses_of(type(module))
    return uses is not None and uses.asks_type


def uses_of(kind: type[nn.Module]) -> Uses | None:
    """What a class does; None without its source."""
    methods = methods_of(kind)
    return None if methods is None else _uses(methods)


def methods_of(kind: type[nn.Module]) -> tuple[Method, ...] | None:
    """The methods that forward leads to, by name; None if one has no source."""
    found: list[Method] = []
    pending, seen = ["forward"], {"forward"}
    while pending:
        name = pending.pop()
        for base in kind.__mro__:
            if name not in vars(base) or base is nn.Module:
                continue
            method = definition_of(vars(base)[name])
            if method is None:
                return None
            found.append(method)
            named = {node.attr for node in ast.walk(method.tree) if isinstance(node, ast.Attribute)} - seen
            seen |= named
            pending += [attribute for attribute in sorted(named) if _is_method(kind, attribute)]
            if not any(isinstance(node, ast.Name) and node.id == "super" for node in ast.walk(method.tree)):
                break  # those of the classes above are not called
    return tuple(found)


def _is_method(kind: type[nn.Module], name: str) -> bool:
    """Whether a class, and not ``nn.Module`` itself, gives this name to what has a definition."""
    value = inspect.getattr_static(kind, name, None)
    return _function(value) is not None and inspect.getattr_static(nn.Module, name, None) is not value


def _function(value: Any) -> FunctionType | None:
    """What runs when an attribute of a class is called or read."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    elif isinstance(value, functools.cached_property):
        value = value.func
    while isinstance(value, FunctionType) and value.__globals__.get("__name__", "").startswith("torch."):
        inner = getattr(value, "__wrapped__", None)  # of @torch.no_grad(), say
        if inner is None:
            break
        value = inner
    return value if isinstance(value, FunctionType) else None


def definition_of(value: Any) -> Method | None:
    """What is behind an attribute of a class; None if that is no function, or one without its source."""
    function = _function(value)
    if function is None or hasattr(function, "__wrapped__"):  # a decorator may do anything
        return None
    tree = _definition(function)
    if tree is None:
        return None
    arguments = [*tree.args.posonlyargs, *tree.args.args]
    is_instance = arguments and not isinstance(value, (staticmethod, classmethod))
    return Method(tree, arguments[0].arg if is_instance else "")


@functools.lru_cache(maxsize=4096)
def _definition(function: FunctionType) -> ast.FunctionDef | None:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, ValueError, SyntaxError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


@functools.lru_cache(maxsize=1024)
def _uses(methods: tuple[Method, ...]) -> Uses:
    touched: set[str] = set()
    asks_type = False
    for method in methods:
        touched |= set(_touched(method.tree))
        asks_type |= any(_is_type_of_another(node, method.instance) for node in ast.walk(method.tree))
    forward = next((method for method in methods if method.tree.name == "forward"), None)
    asked = () if forward is None else _asked(forward.tree)
    return Uses(frozenset(touched), not touched.isdisjoint(WHOLE), frozenset(asked), asks_type)


def _touched(method: ast.FunctionDef) -> Iterator[str]:
    harmless: set[ast.AST] = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Attribute) and node.func.attr in WHOLE):
            harmless.add(node.func)
        elif isinstance(node, ast.Compare) and is_with_none(node):
            harmless.add(node.left)
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node not in harmless:
            yield node.attr


def _asked(forward: ast.FunctionDef) -> Iterator[str]:
    arguments = forward.args.args[1 : len(forward.args.args) - len(forward.args.defaults)]
    names = {argument.arg for argument in arguments}
    for node in ast.walk(forward):
        if isinstance(node, ast.Compare) and is_with_none(node) and isinstance(node.left, ast.Name):
            yield from names & {node.left.id}


def _is_type_of_another(node: ast.AST, instance: str) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type"):
        return False
    return len(node.args) == 1 and not (isinstance(node.args[0], ast.Name) and node.args[0].id == instance)


def is_with_none(node: ast.Compare) -> bool:
    """Whether it is ``... is None`` or ``... is not None``."""
    operands = node.comparators
    is_none = len(operands) == 1 and isinstance(operands[0], ast.Constant) and operands[0].value is None
    return is_none and isinstance(node.ops[0], (ast.Is, ast.IsNot))
