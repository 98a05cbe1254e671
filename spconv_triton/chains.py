"""What follows the SPConv layers of a network, read off its graph.

``torch.fx`` runs a network's forward on symbols. Where that fails, at control flow that depends on values say, the
module in whose forward it failed becomes a node of the graphs around it, and each of its children is traced on its own,
if that is all that its source does with them: call them. A network is a list of :class:`Region`. So are modules with
hooks, which must not see symbols.

A forward that asks what a symbol cannot answer truly (what type it is, whether gradients are on) fails as well, even if
it gets an answer, or goes on after an exception.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import inspect
import operator
import sys
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .branch_norm import is_affine
from .fused import FusedSPConv2d
from .modules import SPConv2d
from .sources import asks_for_none, only_calls

ACTIVATION_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu"}
ACTIVATION_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
}
ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu"}

SUMS = (operator.add, torch.add)
SUMS_IN_PLACE = (operator.iadd,)
FRESH_FUNCTIONS = (*SUMS, operator.sub, operator.mul, operator.truediv, torch.cat)
FRESH_MODULES = (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Linear, SPConv2d, FusedSPConv2d)
"""What returns memory of its own, which nothing else sees."""

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


@dataclass
class Chain:
    """An SPConv layer's call and what follows it as far as it folds.

    Attributes:
        nodes: the call, then what is folded, in order.
        norm: the batch norm among them.
        residual: what is added.
        in_place: whether the sum is written over the ``"output"`` or the ``"residual"``; empty if over neither.
        activation: by name.
        stopped: why not more is folded; empty where an activation ends it.
    """

    nodes: list[fx.Node]
    norm: nn.Module | None = None
    residual: fx.Node | None = None
    in_place: str = ""
    activation: str = "none"
    stopped: str = ""

    @property
    def signature(self) -> tuple[Any, ...]:
        """What calls of one layer must agree in."""
        return self.norm, self.residual is not None, self.in_place, self.activation

    @property
    def frames(self) -> tuple[Frame, ...]:
        """The calls that all nodes are in."""
        stacks = [node.meta["frames"] for node in self.nodes]
        shared = []
        for level in zip(*stacks, strict=False):
            if any(frame is not level[0] for frame in level):
                break
            shared.append(level[0])
        return tuple(shared)

    @property
    def inner_frames(self) -> list[Frame]:
        """The calls that some node is in, from the innermost that all are in."""
        outer = len(self.frames) - 1
        return list(dict.fromkeys(frame for node in self.nodes for frame in node.meta["frames"][outer:]))


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


class _Symbol(_Asked):
    """One that sees what is written over it too; fx takes ``x += y`` for ``x = x + y``."""


class _Attribute(_Asked, fx.proxy.Attribute):
    """Of a symbol."""


def _caller() -> str:
    """The module of what called the caller."""
    return str(sys._getframe(2).f_globals.get("__name__", ""))


def _is_called_by_name() -> bool:
    """Whether the caller was reached by ``hasattr`` or ``getattr``, not by a dot."""
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

    def ask(self, what: str) -> None:
        """Note a question that values may answer in another way than symbols."""
        if not self.asked:
            self.asked = what
            self.failed = self.frames[-1].module if len(self.frames) > 1 else None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.inlined is not None and m not in self.inlined:
            return True
        own = isinstance(m, (SPConv2d, FusedSPConv2d)) or m in self.given_leaves or has_hooks(m)
        return own or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.is_leaf_module(m, self.path_of_module(m)):
            self.found_leaves.add(m)
            return super().call_module(m, forward, args, kwargs)
        self.frames.append(Frame(m, _is_open(m, args, kwargs)))
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


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at, or changes, what goes into ``module`` or comes out."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names) or "forward" in vars(module)


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
    tracer.frames.append(Frame(root, bool(defaults) or asks_for_none(root)))
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
    are_enabled, enter = torch.is_grad_enabled, torch.autocast.__enter__

    def is_grad_enabled() -> bool:
        if not _caller().startswith("torch."):
            tracer.ask("whether gradients are enabled")
        return are_enabled()

    def entered(context: Any) -> Any:
        tracer.ask("for autocast")
        return enter(context)

    with (
        mock.patch.object(torch, "is_grad_enabled", is_grad_enabled),
        mock.patch.object(torch.autocast, "__enter__", entered),
    ):
        yield


def find_regions(model: nn.Module) -> list[Region]:
    """The network as graphs that together hold every module that is called, as far as it can be known."""
    regions: list[Region] = []
    seen: set[nn.Module] = set()
    pending = [("", model)]
    while pending:
        name, root = pending.pop()
        if root in seen or isinstance(root, (SPConv2d, FusedSPConv2d)):
            continue  # what is inside a layer is not called by a forward of the network
        seen.add(root)
        region = _trace_region(name, root)
        if region is None:
            pending += _called_children(name, root)
            continue
        regions.append(region)
        for below, part in root.named_modules(prefix=name):
            if part in region.leaves:
                pending += [(below, part)] if has_hooks(part) else _called_children(below, part)
    return regions


def _called_children(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The parts that a forward calls which cannot be traced; of those that it reaches into, their parts."""
    found: list[tuple[str, nn.Module]] = []
    for key, child in module.named_children():
        below = f"{name}.{key}" if name else key
        if only_calls(module, key, unknown=False) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found.append((below, child))
        else:
            found += _called_children(below, child)
    return found


def _trace_region(name: str, root: nn.Module) -> Region | None:
    opaque: set[nn.Module] = set()
    while True:
        tracer = Tracer(opaque)
        try:
            with unchanged(root) as changes:
                graph = trace(root, tracer)
        except Exception:  # a forward may raise anything at a symbol
            failed = tracer.failed
        else:
            if not changes.contents:
                return Region(root, graph, tracer.found_leaves, name)
            failed = changes.contents[0]  # in which others may find what was computed
        if failed is None or failed is root or failed in opaque:
            return None
        opaque.add(failed)


@dataclass
class Changes:
    """What a forward did to its modules while it was traced.

    Attributes:
        attributes: those on which it set some.
        contents: those into whose lists and dictionaries it put something.
    """

    attributes: list[nn.Module] = field(default_factory=list)
    contents: list[nn.Module] = field(default_factory=list)


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


def _are_the_same(now: Any, was: Any) -> bool:
    """Whether two lists or dictionaries hold the same objects."""
    if isinstance(was, dict):
        return now.keys() == was.keys() and all(now[key] is was[key] for key in was)
    return len(now) == len(was) and all(map(operator.is_, now, was))


def follow(node: fx.Node, region: Region, taken: Collection[fx.Node] = ()) -> Chain:
    """What folds into the SPConv layer that ``node`` calls; nothing that is ``taken``."""
    chain = Chain([node])
    layer = region.module_of(node)
    assert isinstance(layer, SPConv2d)
    if len(node.args) != 1 or node.kwargs:
        chain.stopped = "is not called with its input alone"
        return chain
    while chain.activation == "none":
        current = chain.nodes[-1]
        users = list(current.users)
        if len(users) != 1:
            chain.stopped = f"its result is used {len(users)} times" if users else "its result is not used"
            return chain
        user = users[0]
        chain.stopped = "is added to another layer's result" if user in taken else _fold(chain, user, region, layer)
        if chain.stopped:
            return chain
        chain.nodes.append(user)
    return chain


def _fold(chain: Chain, user: fx.Node, region: Region, layer: SPConv2d) -> str:
    """Note in ``chain`` what ``user`` computes; or why it does not fold, and then nothing is noted."""
    current = chain.nodes[-1]
    name = _describe(user, region)
    if user.op == "call_module":
        module = region.module_of(user)
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            reason = norm_misfit(module, layer.weight_gwc, layer.out_channels)
            if len(chain.nodes) > 1:
                reason = "does not follow the convolution at once"
            if reason or user.args != (current,) or user.kwargs:
                return f"is followed by {name}, which {reason or 'has other arguments'}"
            chain.norm = module
            return ""
    activation = _activation(user, current, region)
    if activation:
        chain.activation = activation
        return ""
    if chain.residual is None and _is_sum(user):
        other = next((arg for arg in user.args if arg is not current), None)
        if isinstance(other, fx.Node):
            if _writes_elsewhere(user, current, region):
                return f"is added in place to {other.name}, which may be used elsewhere"
            if _is_changed_between(chain.nodes[0], user, region):
                return f"has an input that may be changed before {user.name}"
            chain.residual = other
            if user.target == "add_" or user.target in SUMS_IN_PLACE:
                chain.in_place = "output" if user.args[0] is current else "residual"
            return ""
    return f"is followed by {name}"


def attribute(node: fx.Node, region: Region) -> object:
    """What ``node`` reads off the region's root; None for a tensor that the traced forward made itself."""
    parent, _, name = str(node.target).rpartition(".")
    return getattr(region.root.get_submodule(parent), name, None)


def norm_misfit(norm: nn.BatchNorm2d | nn.SyncBatchNorm, weight: Tensor, channels: int) -> str:
    """Why a norm does not fold into a convolution with such a weight and so many outputs; empty if it does."""
    if norm.training:
        return "is in training mode"
    if norm.running_mean is None:
        return "has no running statistics"
    if not is_affine(norm):
        return "has hooks" if has_hooks(norm) else f"is a {type(norm).__name__}, a subclass of a batch norm"
    if norm.running_mean.dtype != weight.dtype:
        return f"is in {norm.running_mean.dtype}, the convolution in {weight.dtype}"
    if norm.running_mean.device != weight.device:
        return f"is on {norm.running_mean.device}, the convolution on {weight.device}"
    if norm.num_features != channels:
        return f"has {norm.num_features} channels, not {channels}"
    return ""


def _activation(user: fx.Node, current: fx.Node, region: Region) -> str:
    """The activation that ``user`` applies to ``current``; empty if it is none that is known."""
    flags = user.kwargs.keys() - {"inplace"}
    if user.args[:1] != (current,) or flags or not all(isinstance(arg, bool) for arg in user.args[1:]):
        return ""
    if user.op == "call_module":
        module = region.module_of(user)
        return "" if has_hooks(module) else ACTIVATION_MODULES.get(type(module), "")
    if user.op == "call_method":
        return ACTIVATION_METHODS.get(str(user.target), "")
    return ACTIVATION_FUNCTIONS.get(user.target, "")


def _is_sum(user: fx.Node) -> bool:
    """Whether ``user`` adds two things, and does nothing else."""
    if user.kwargs or len(user.args) != 2:
        return False
    if user.op == "call_method":
        return user.target in ("add", "add_")
    return user.op == "call_function" and user.target in (*SUMS, *SUMS_IN_PLACE)


def _writes_elsewhere(user: fx.Node, current: fx.Node, region: Region) -> bool:
    """Whether a sum is written over something other than ``current`` that somebody may still read."""
    in_place = user.target == "add_" or user.target in SUMS_IN_PLACE
    target = user.args[0]
    if not in_place or target is current or not isinstance(target, fx.Node):
        return False
    order = {node: i for i, node in enumerate(user.graph.nodes)}
    others = [other for other in target.users if other is not user]
    # One that is not fresh may be a view, and read later.
    return not _is_fresh(target, region) or any(
        order[other] > order[user] or not _is_fresh(other, region) for other in others
    )


def _is_fresh(node: fx.Node, region: Region) -> bool:
    """Whether ``node`` makes a tensor whose memory is no other's."""
    if node.op == "call_module":
        return type(region.module_of(node)) in FRESH_MODULES
    return node.op == "call_function" and node.target in FRESH_FUNCTIONS and "out" not in node.kwargs


def _origins(node: fx.Node, region: Region) -> set[fx.Node]:
    """The nodes whose memory the result of ``node`` may share."""
    found = {node}
    pending = [node]
    while pending:
        current = pending.pop()
        if not _is_fresh(current, region):
            new = set(current.all_input_nodes) - found
            found |= new
            pending += new
    return found


def _is_changed_between(call: fx.Node, user: fx.Node, region: Region) -> bool:
    """Whether anything between ``call`` and ``user`` may write to what ``call`` reads, which is to be read later."""
    read: set[fx.Node] = set().union(*(_origins(node, region) for node in call.all_input_nodes))
    node = call.next
    while node is not user:
        if any(_origins(written, region) & read for written in _written(node, region)):
            return True
        node = node.next
    return False


def _written(node: fx.Node, region: Region) -> list[fx.Node]:
    """What ``node`` may write to."""
    inputs = node.all_input_nodes
    if node.op == "call_module":
        parts = list(region.module_of(node).modules())
        known = all(type(part).__module__.startswith("torch.nn.") or type(part) in FRESH_MODULES for part in parts)
        return [] if known and not any(getattr(part, "inplace", False) for part in parts) else inputs
    if node.op == "call_method":
        name = str(node.target)
        changes = name.endswith("_") and (not name.endswith("__") or name.startswith(("__i", "__set")))
        return inputs[:1] if changes else []
    if node.op != "call_function":
        return []
    name = getattr(node.target, "__name__", "")
    if isinstance(node.kwargs.get("out"), fx.Node):
        return inputs
    if getattr(node.target, "__module__", "") == operator.add.__module__:
        return inputs[:1] if name in IN_PLACE or name == "setitem" else []
    in_place = node.kwargs.get("inplace", False) or any(arg is True for arg in node.args)
    known = getattr(node.target, "__module__", "").startswith("torch") or hasattr(torch, name)
    return inputs if in_place or name.endswith("_") or not known else []


def _describe(node: fx.Node, region: Region) -> str:
    """``node`` in words, for a report."""
    if node.op == "output":
        return f"the end of {type(region.root).__name__}.forward"
    if node.op == "call_module":
        return f"{region.name_of(node)} ({type(region.module_of(node)).__name__})"
    return f"{getattr(node.target, '__name__', node.target)}"
