"""What code that cannot be traced does with the parts of a network: those that it calls, and all that it may reach.

Read off the source of the methods that a forward leads to. It calls a part where it says ``self.stem(x)``,
``self.stages[i](x)`` or, in a loop over ``self.stages``, ``stage(x)``. It may reach whatever stands below a part that
it does anything else with, below all of its parts if it gives ``self`` away, and what plain attributes hold.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections import deque
from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from torch import fx, nn

from .sources import WHOLE, Method, is_with_none, methods_of

Path = tuple[str, ...]
"""Names of attributes, from a module on."""

ELEMENT = "[]"
"""In a path: any element of a container."""

ASKS = ("hasattr", "isinstance", "type")
"""Functions that tell of a module what it is."""

LOOKS = ("callable", "id", "len")
"""Functions that tell nothing that fusing changes."""

OF_MODULES = ("_modules", "_parameters", "_buffers")
"""Attributes in which ``nn.Module`` keeps what it holds."""


class Reach(NamedTuple):
    """What a forward does with the modules below its own.

    Attributes:
        called: those that it only calls, by name.
        exposed: the others that it may get hold of.
        asked: those of which it asks what they are.
    """

    called: dict[str, nn.Module]
    exposed: set[nn.Module]
    asked: set[nn.Module]


def reach_of(module: nn.Module) -> Reach:
    """What the forward of ``module`` does, which cannot be traced."""
    below = set(module.modules()) - {module}
    paths = _paths_of(module) if below else None
    if paths is None:
        return Reach({}, below, set())
    called: dict[str, nn.Module] = {}
    touched: set[nn.Module] = set()
    for path in sorted(paths.called):
        parts, is_whole = _resolve(module, path)
        if is_whole:
            called.update(parts)
        else:
            touched.update(parts.values())
    for path in paths.touched:
        touched.update(_resolve(module, path)[0].values())
    names = {path[0] for path in set().union(*paths) if path}
    if any(_hides_modules(module, name) for name in names):
        hidden = {held for name in names for held in _held(vars(module).get(name))}
        return Reach({}, below.union(*(held.modules() for held in hidden)), set())
    exposed = {part for root in touched for part in root.modules()}
    called = {name: part for name, part in called.items() if part not in exposed}
    inside = {part for root in called.values() for part in root.modules()}
    asked = {part for path in paths.asked for part in _resolve(module, path)[0].values()}
    return Reach(called, (below - inside) | exposed, asked)


def held_by_attributes(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that lists, dictionaries, functions and so on hold beside the network's own tree, and what is inside
    of them, each with where; not modules around the one whose attribute it is."""
    found: dict[nn.Module, str] = {}
    within = set(model.modules())
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in OF_MODULES or key.endswith("_hooks"):
                continue
            for held in _held(value):
                if held in within and module not in set(held.modules()):
                    for part in held.modules():
                        found.setdefault(part, f"{name}.{key}" if name else key)
    return found


class _Paths(NamedTuple):
    """Of attributes of ``self``: called, asked for what they are, and otherwise used."""

    called: set[Path]
    asked: set[Path]
    touched: set[Path]


def _paths_of(module: nn.Module) -> _Paths | None:
    if "forward" in vars(module):
        return None
    if isinstance(module, fx.GraphModule):
        return _paths_of_graph(module.graph)
    methods = methods_of(type(module))
    if methods is None:
        return None
    paths = _Paths(set(), set(), set())
    for method in methods:
        reader = _Reader(method)
        reader.visit_body()
        if reader.gives_itself_away:
            return None
        for all_of_it, of_method in zip(paths, reader.paths, strict=True):
            all_of_it.update(of_method)
    return paths


def _paths_of_graph(graph: fx.Graph) -> _Paths:
    paths = _Paths(set(), set(), set())
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            path = tuple(str(node.target).split("."))
            (paths.called if node.op == "call_module" else paths.touched).add(path)
    return paths


def _resolve(module: nn.Module, path: Path) -> tuple[dict[str, nn.Module], bool]:
    """The modules that a path leads to, by name, or as far as it leads through modules; and whether it leads there."""
    parts = {"": module}
    for step in path:
        children: dict[str, nn.Module] = {}
        for name, part in parts.items():
            for key, child in part._modules.items():  # named_children knows a module by one of its names
                if child is not None and step in (key, ELEMENT):
                    children[f"{name}.{key}" if name else key] = child
        if not children:
            # An attribute of its own is no part; one of a part is more than a call of that.
            return ({}, False) if list(parts) == [""] else (parts, False)
        parts = children
    return parts, True


def _hides_modules(module: nn.Module, name: str) -> bool:
    """Whether an attribute of ``module`` that is none of its parts may lead to modules all the same."""
    if name in WHOLE:
        return True
    if name in vars(module):
        return any(True for _ in _held(vars(module)[name]))
    value = inspect.getattr_static(type(module), name, None)
    known = (FunctionType, staticmethod, classmethod, property, functools.cached_property, type)
    return callable(value) and not isinstance(value, known)


def _held(value: Any) -> Iterator[nn.Module]:
    """The modules that a value leads to."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, nn.Module):
            yield current
        elif isinstance(current, dict):
            pending += [*current.keys(), *current.values()]
        elif isinstance(current, (list, tuple, set, frozenset, deque)):
            pending += current
        elif isinstance(current, functools.partial):
            pending += [current.func, current.args, current.keywords]
        elif isinstance(current, MethodType):
            pending.append(current.__self__)
        elif isinstance(current, FunctionType):
            cells = current.__closure__ or ()
            pending += [cell.cell_contents for cell in cells if _is_filled(cell)]
            pending += [current.__defaults__, current.__kwdefaults__]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018, which raises where it is empty
    except ValueError:
        return False
    return True


def _of_module(path: Path) -> Path:
    """``stem`` for ``stem.forward``."""
    return path[:-1] if len(path) > 1 and path[-1] == "forward" else path


class _Reader(ast.NodeVisitor):
    """Reads what a method does with attributes of ``self``.

    Attributes:
        paths: those that it uses.
        gives_itself_away: whether it does anything with ``self`` but read attributes of it.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.paths = _Paths(set(), set(), set())
        self.gives_itself_away = False
        self._aliases: dict[str, set[Path]] = {}
        self._named: set[ast.AST] = set()
        known = -1
        while known < (known := sum(map(len, self._aliases.values()))):  # one name may stand for what another does
            for node in ast.walk(method.tree):
                if isinstance(node, (ast.For, ast.comprehension)):
                    self._bind(node.target, node.iter)
                elif isinstance(node, ast.Assign) and len(node.targets) == 1:
                    self._take(node.targets[0], node.value, ())

    def visit_body(self) -> None:
        for node in self.method.tree.body:
            self.visit(node)

    def _bind(self, target: ast.expr, iterated: ast.expr) -> None:
        """Take the target of a loop for the elements of the containers that it runs over."""
        if isinstance(iterated, ast.Call):
            name = iterated.func.id if isinstance(iterated.func, ast.Name) else ""
            targets = target.elts if isinstance(target, ast.Tuple) else []
            if name in ("reversed", "list", "tuple") and len(iterated.args) == 1:
                self._bind(target, iterated.args[0])
            elif name == "enumerate" and len(targets) == 2:
                self._bind(targets[1], iterated.args[0])
            elif name == "zip" and len(targets) == len(iterated.args):
                for part, of_part in zip(targets, iterated.args, strict=True):
                    self._bind(part, of_part)
            elif isinstance(iterated.func, ast.Attribute) and not iterated.args:
                if iterated.func.attr in ("values", "children"):
                    self._bind(target, iterated.func.value)
                elif iterated.func.attr in ("items", "named_children") and len(targets) == 2:
                    self._bind(targets[1], iterated.func.value)
                if iterated.func.value in self._named:
                    self._named.add(iterated.func)
            return
        self._take(target, iterated, (ELEMENT,))

    def _take(self, target: ast.expr, value: ast.expr, step: Path) -> None:
        """Take a name for what is a step behind a value."""
        paths = self._chains(value)
        if paths and isinstance(target, ast.Name):
            self._aliases.setdefault(target.id, set()).update(path + step for path in paths)
            self._named.add(value)

    def _chains(self, node: ast.AST) -> set[Path]:
        """The paths that an expression may stand for; empty if it is no attribute of ``self``."""
        if isinstance(node, ast.Name):
            return {()} if node.id == self.method.instance else self._aliases.get(node.id, set())
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "super":
                return {()}
            name = node.args[1] if node.func.id == "getattr" and len(node.args) == 2 else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                return {(*path, *name.value.split(".")) for path in self._chains(node.args[0])}
            return set()
        if isinstance(node, ast.Attribute):
            return {(*path, node.attr) for path in self._chains(node.value)}
        if isinstance(node, ast.Subscript) and not isinstance(node.slice, (ast.Slice, ast.Tuple)):
            return {(*path, ELEMENT) for path in self._chains(node.value)}
        return set()

    def visit(self, node: ast.AST) -> None:
        if node in self._named or (isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)):
            return
        paths = self._chains(node)
        if not paths:
            super().visit(node)
            return
        self._note(paths, self.paths.touched)
        self._visit_indices(node)

    def _note(self, paths: Iterable[Path], among: set[Path]) -> None:
        paths = set(paths)
        self.gives_itself_away |= () in paths
        among.update(paths)

    def _visit_indices(self, node: ast.AST) -> None:
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            if isinstance(node, ast.Subscript):
                self.visit(node.slice)
            node = node.value

    def visit_Call(self, node: ast.Call) -> None:
        paths = self._chains(node.func)
        if paths and node.func not in self._named:
            self._note({_of_module(path) for path in paths}, self.paths.called)
            self._visit_indices(node.func)
        else:
            self.visit(node.func)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            of_argument = self._chains(argument) if name in (*ASKS, *LOOKS) else set()
            if name in ASKS:
                self.paths.asked.update(of_argument)
            if not of_argument:
                self.visit(argument)

    def visit_Compare(self, node: ast.Compare) -> None:
        if not (is_with_none(node) and self._chains(node.left)):
            self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self._visit_test(node.operand) if isinstance(node.op, ast.Not) else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self._visit_test(node.test)
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._visit_test(node.test)
        self.visit(node.body)
        self.visit(node.orelse)

    def _visit_test(self, node: ast.expr) -> None:
        """Whether there is a part, or it has elements, tells nothing more of it."""
        for operand in node.values if isinstance(node, ast.BoolOp) else [node]:
            if not self._chains(operand):
                self.visit(operand)
