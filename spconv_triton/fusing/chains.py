"""What follows the SPConv layers of a network, read off its graphs (:mod:`.regions`)."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..branch_norm import norm_misfit
from ..fused import FusedSPConv2d
from ..hooks import has_hooks
from ..modules import SPConv2d
from .regions import IN_PLACE, Frame, Region

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
