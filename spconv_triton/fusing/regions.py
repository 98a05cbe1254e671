"""A network as graphs.

``torch.fx`` runs a network's forward on symbols. Where that fails, at control flow that depends on values say, the
module in whose forward it failed becomes a node of the graphs around it, and each of the parts that it calls is traced
on its own; what else its source does with parts, :mod:`.reach` tells. Modules with hooks, which must not see symbols,
are nodes likewise. A network is thus a list of :class:`Region`.

A forward that asks what a symbol cannot answer truly (what type it is, whether gradients are on) fails as well, even if
it gets an answer, or goes on after an exception. What other threads do meanwhile is theirs.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
import operator
import sys
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from ..fused import FusedSPConv2d
from ..hooks import has_hooks
from ..modules import SPConv2d
from .module_changes import unchanged
from .reach import held_by_attributes, reach_of
from .sources import asks_for_none, asks_for_type, is_only_called

IN_PLACE = [name for name in dir(operator) if name.startswith("i") and hasattr(operator, f"__{name[1:]}__")]
"""iadd, imul and so on."""


@dataclass(eq=False)
class Frame:
    """One call of a module's forward.

    Attributes:
        module: whose.
        is_open: whether it was given less than all its arguments as symbols: another call may go another way.
    """

    module: nn.Module
    is_open: bool


@dataclass
class Region:
    """A part of a network as a graph; every node has its frames, outermost first, in ``meta["frames"]``.

    Attributes:
        root: the module whose forward this is.
        graph: what it calls.
        leaves: modules that are nodes of the graph.
        name: of the root in the network.
    """

    root: nn.Module
    graph: fx.Graph
    leaves: set[nn.Module]
    name: str = ""

    def module_of(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(str(node.target))

    def name_of(self, node: fx.Node) -> str:
        """The module that ``node`` calls, as the network calls it."""
        return ".".join(filter(None, (self.name, str(node.target))))


class UndecidedError(TypeError):
    """A forward asked what only values can tell."""


class _Asked(fx.Proxy):
    """A symbol that tells its tracer what a forward asks of it.

    Whatever the answer is, or however the forward goes on after an exception, values might have led it elsewhere.
    """

    tracer: Any

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if not _caller().startswith("torch."):
            self.tracer.ask("what type a value is")
        return type(self)

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name) and _is_called_by_name():
            self.tracer.ask(f"whether a value has {name}")
        return _Attribute(self, name)

    def __hash__(self) -> int:
        if not _caller().startswith("torch."):
            self.tracer.ask("for the hash of a value")
        return super().__hash__()

    def __str__(self) -> str:
        if _is_called_by_name() and not _caller().startswith("torch."):  # and is not part of a message, f"{value}"
            self.tracer.ask("for the text of a value")
        return super().__str__()


class _Symbol(_Asked):
    """One that sees what is written over it too; fx takes ``x += y`` for ``x = x + y``."""


class _Attribute(_Asked, fx.proxy.Attribute):
    """Of a symbol."""


def _caller() -> str:
    """The module of what called the caller."""
    return str(sys._getframe(2).f_globals.get("__name__", ""))


def _is_called_by_name() -> bool:
    """Whether the caller was reached by ``hasattr``, ``getattr`` or ``str``, not by a dot or a formatted string."""
    frame = sys._getframe(2)
    return "CALL" in dis.opname[frame.f_code.co_code[frame.f_lasti]]


def _in_place(name: str) -> Any:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


def _asking(name: str) -> Any:
    def method(self: Any, *arguments: Any) -> Any:
        self.tracer.ask(f"for the {name} of a value")
        inherited = getattr(super(_Asked, self), f"__{name}__", None)
        if inherited is None:
            raise UndecidedError(f"a symbol has no {name}")
        return inherited(*arguments)

    return method


for _name in IN_PLACE:
    setattr(_Symbol, f"__{_name}__", _in_place(_name))
for _name in ("bool", "int", "index", "float", "complex", "len", "iter", "contains"):
    setattr(_Asked, f"__{_name}__", _asking(_name))


class Tracer(fx.Tracer):
    """Traces through every module but those of ``torch.nn``, SPConv layers, hooked ones and the given ``leaves``.

    Attributes:
        failed: the innermost module in whose forward an exception was raised, or that asked.
        asked: what it asked.
    """

    proxy_buffer_attributes = True  # so that the graph shows who reads them

    def __init__(self, leaves: Collection[nn.Module] = (), inlined: Collection[nn.Module] | None = None) -> None:
        super().__init__()
        self.given_leaves = leaves
        self.inlined = inlined
        self.frames: list[Frame] = []
        self.found_leaves: set[nn.Module] = set()
        self.failed: nn.Module | None = None
        self.asked = ""
        self.thread = threading.get_ident()

    def is_elsewhere(self) -> bool:
        """Whether the caller runs in a thread that does not trace: ``torch.fx`` takes the calls of all of them."""
        return threading.get_ident() != self.thread

    def ask(self, what: str) -> None:
        """Note a question that values may answer in another way than symbols."""
        if not (self.asked or self.is_elsewhere()):
            self.asked = what
            self.failed = self.frames[-1].module if len(self.frames) > 1 else None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.inlined is not None and m not in self.inlined:
            return True
        own = isinstance(m, (SPConv2d, FusedSPConv2d)) or m in self.given_leaves or has_hooks(m)
        return own or super().is_leaf_module(m, module_qualified_name)

    def enter(self, frame: Frame) -> None:
        """Note that the forward of a module begins."""
        self.frames.append(frame)
        if asks_for_type(frame.module):
            self.ask("what type a value is")

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.is_elsewhere() else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.is_elsewhere():
            return forward(*args, **kwargs)
        if self.is_leaf_module(m, self.path_of_module(m)):
            self.found_leaves.add(m)
            return super().call_module(m, forward, args, kwargs)
        self.enter(Frame(m, _is_open(m, args, kwargs)))
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m
            raise
        self.frames.pop()
        return result

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["frames"] = tuple(self.frames)
        return node


def _is_open(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    parameters = inspect.signature(module.forward).parameters
    given = (*args, *kwargs.values())
    return len(given) < len(parameters) or not all(isinstance(value, fx.Proxy) for value in given)


def trace(root: nn.Module, tracer: Tracer) -> fx.Graph:
    """The graph of ``root``, its optional arguments at their defaults; ``tracer`` is used up.

    Raises:
        UndecidedError: a forward asked what a symbol cannot answer.
        Exception: whatever a forward raises at a symbol.
    """
    parameters = inspect.signature(type(root).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    tracer.enter(Frame(root, bool(defaults) or asks_for_none(root)))
    with _one_at_a_time, _noting_questions(tracer):
        graph = tracer.trace(root, defaults or None)
    if tracer.asked:
        raise UndecidedError(f"it asks {tracer.asked}")
    for node in graph.nodes:
        if isinstance(node.type, str):  # an annotation under PEP 563, which GraphModule of PyTorch 2.13 does not pickle
            node.type = None
    return graph


_one_at_a_time = threading.RLock()
"""``torch.fx`` and what follows put other functions in the places of PyTorch's while they trace."""


@contextlib.contextmanager
def _noting_questions(tracer: Tracer) -> Iterator[None]:
    """Of what a forward may ask about its surroundings, which need not be those of its calls."""
    enter = torch.autocast.__enter__

    def asking(name: str, what: str) -> Any:
        function = getattr(torch, name)

        def asked(*args: Any, **kwargs: Any) -> Any:
            if not _caller().startswith("torch."):
                tracer.ask(f"whether {what}")
            return function(*args, **kwargs)

        return mock.patch.object(torch, name, asked)

    def entered(context: Any) -> Any:
        tracer.ask("for autocast")
        return enter(context)

    with (
        asking("is_grad_enabled", "gradients are enabled"),
        asking("is_inference_mode_enabled", "inference mode is"),
        asking("is_autocast_enabled", "autocast is"),
        mock.patch.object(torch.autocast, "__enter__", entered),
    ):
        yield


@dataclass
class Network:
    """What is known of the calls in a network.

    Attributes:
        regions: graphs that together hold every module that is called, as far as it can be known.
        callers: for each SPConv layer, how many forwards call it that cannot be traced.
        exposed: modules that may be called, or looked into, by what is in no graph; each with that.
        asked: modules of which such code asks what they are.
        opaque: modules whose forwards are in no graph.
    """

    regions: list[Region]
    callers: Counter[nn.Module]
    exposed: dict[nn.Module, str]
    asked: set[nn.Module]
    opaque: set[nn.Module]

    def only_calls(self, part: nn.Module, model: nn.Module) -> bool:
        """Whether no forward in ``model`` is known to do more with ``part`` than call it."""
        traced = (module for module in model.modules() if module not in self.opaque)
        return part not in self.asked and part not in self.exposed and is_only_called(part, traced)


def find_regions(model: nn.Module) -> Network:
    """The network as graphs, and what is outside of them."""
    held = held_by_attributes(model)
    exposed = {part: f"is held by the attribute {place} too" for part, place in held.items()}
    network = Network([], Counter(), exposed, set(), set())
    seen: set[nn.Module] = set()
    pending = [("", model)]

    def leave_opaque(name: str, module: nn.Module) -> None:
        called, exposed, asked = reach_of(module)
        network.opaque.add(module)
        network.asked.update(asked)
        reason = f"may be reached by {type(module).__name__}.forward, which cannot be traced"
        for part in exposed:
            network.exposed.setdefault(part, reason)
        for key, part in called.items():
            pending.append((f"{name}.{key}" if name else key, part))
            network.callers[part] += isinstance(part, SPConv2d)

    while pending:
        name, root = pending.pop()
        if root in seen or isinstance(root, (SPConv2d, FusedSPConv2d)):
            continue  # what is inside a layer is not called by a forward of the network
        seen.add(root)
        region = _trace_region(name, root)
        if region is None:
            leave_opaque(name, root)
            continue
        network.regions.append(region)
        for below, part in root.named_modules(prefix=name):
            if part in region.leaves and has_hooks(part):
                pending.append((below, part))
            elif part in region.leaves and not isinstance(part, (SPConv2d, FusedSPConv2d)):
                leave_opaque(below, part)
    return network


def _trace_region(name: str, root: nn.Module) -> Region | None:
    if "forward" in vars(root):  # torch.fx would trace that of its class
        return None
    opaque: set[nn.Module] = set()
    while True:
        tracer = Tracer(opaque)
        try:
            with unchanged(root) as changes:
                graph = trace(root, tracer)
        except Exception:  # a forward may raise anything at a symbol
            failed = tracer.failed
        else:
            changed = [*changes.contents, *changes.state]  # in which others, or the next call, may find something
            if not changed:
                return Region(root, graph, tracer.found_leaves, name)
            failed = changed[0]
        if failed is None or failed is root or failed in opaque:
            return None
        opaque.add(failed)


def attribute(node: fx.Node, region: Region) -> object:
    """What ``node`` reads off the region's root; None for a tensor that the traced forward made itself."""
    parent, _, name = str(node.target).rpartition(".")
    return getattr(region.root.get_submodule(parent), name, None)
