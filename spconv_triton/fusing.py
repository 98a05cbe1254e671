"""Folding what follows SPConv layers into them, for inference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel

from .branch_norm import folds
from .chains import Chain, follow
from .fused import FusedSPConv2d
from .hooks import has_hooks, is_compiled
from .module_changes import unchanged
from .modules import SPConv2d
from .plain_norms import FoldedNorm, find_folded_norms
from .regions import Region, Tracer, attribute, find_regions, trace


@dataclass(frozen=True)
class Fold:
    """What becomes of one SPConv layer.

    Attributes:
        names: where it stands in the network; several where it is shared.
        folded: what is folded into it, in order.
        reason: why nothing more is; empty where an activation ends it.
    """

    names: tuple[str, ...]
    folded: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        name = ", ".join(self.names) or "the model"
        return "; ".join(filter(None, (f"{name}: {', '.join(self.folded) or 'nothing'}", self.reason)))


@dataclass(frozen=True)
class Fusion:
    """What :func:`spconv_triton.fuse` does to a network; printed, it is a readable report.

    Attributes:
        fused, kept: its SPConv layers, each in the network's order.
        norms: the plain convolutions and the norms folded into them.
    """

    fused: tuple[Fold, ...]
    kept: tuple[Fold, ...]
    norms: tuple[FoldedNorm, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} of {len(self.fused) + len(self.kept)} SPConv layers are fused"]
        lines += [f"  {fold}" for fold in self.fused]
        lines += ["the others stay:"] if self.kept else []
        lines += [f"  {fold}" for fold in self.kept]
        lines += ["norms fold into plain convolutions:"] if self.norms else []
        lines += [f"  {norm}" for norm in self.norms]
        return "\n".join(lines)


def fuse(model: nn.Module, *, plain_norms: bool = False, report: Callable[[Fusion], object] | None = None) -> nn.Module:
    """A copy of ``model`` for inference, whose SPConv layers compute what follows them before writing their output.

    Into a layer fold, in this order: the norms in its branches; an ``nn.BatchNorm2d`` or ``nn.SyncBatchNorm``; the
    addition of a residual (``+``, ``+=``, ``torch.add``, ``add_``); ReLU, ReLU6 or SiLU (module or function). The
    layer is then a :class:`spconv_triton.fused.FusedSPConv2d`, and has no parameters. Results are the model's to within
    rounding. Anything else is as it was, unless ``plain_norms`` asks for the norms behind plain convolutions too.

    The graph is read by ``torch.fx``. Modules that cannot be traced, because of control flow say, are left as they are,
    and the parts that they call, as far as their source tells, are fused each on its own. Where a norm and an
    activation are modules of their own, nothing else calls them and no residual is added, ``nn.Identity`` takes their
    places. Else the module in whose forward they are called becomes a ``torch.fx.GraphModule``, which has its parts
    under their names but is of no class of its own. timm's ``BatchNormAct2d``, a norm and an activation in one, becomes
    a sequence of the two first.

    A layer stays, with the reason in the report, where its result is used more than once or is a result of the network;
    where an activation stands before the norm; where a norm is in training mode, has no running statistics, another
    dtype or hooks; where calls of it are followed by different things; where a forward has optional arguments, which
    may change what follows; where a forward asks what a symbol cannot answer (types, gradients, autocast), keeps what
    it computes, or looks into parts of which less would be left; where a forward that cannot be traced may do more with
    it, or with what follows, than call the part around both; where a list or another attribute holds it beside the
    network's own tree; and where the layer, or what would have to be rewritten, has hooks.

    What is fused is the forward as it is now. Other methods that stop before a norm find it in the layer already, and
    flags that are set on the copy later change nothing.

    Args:
        model: in eval mode. Compile it and export it afterwards.
        plain_norms: whether to fold batch norms into ``nn.Conv2d`` as well, each where it alone reads the convolution's
            result, by ``torch.nn.utils.fusion.fuse_conv_bn_eval``.
        report: called with the :class:`.Fusion`; ``print`` will do.

    Returns:
        The copy; ``model`` stays as it was, to be trained further. Fusing the copy again changes nothing. The copy
        has no gradients: call it under ``torch.inference_mode()`` or ``torch.no_grad()``, and to train, go back to
        ``model``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a model of which an SPConv layer or a module around it is in training mode, or that is scripted,
            compiled or wrapped in DDP.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(plain_norms, bool):
        raise TypeError(f"plain_norms must be True or False, got {plain_norms!r}")
    if report is not None and not callable(report):
        raise TypeError(f"report must be callable or None, got {report!r}")
    _check_state(model)
    model = _with_norms_apart(_copied(model))
    plan = _Plan(model, plain_norms)
    if report is not None:
        report(plan.report())
    return plan.carry_out()


def _copied(model: nn.Module) -> nn.Module:
    """A copy in the same modes and with the same hooks: that of a ``torch.fx.GraphModule`` is a new one."""
    memo: dict[int, Any] = {}  # by which hooks of the copy see the copy
    copied = copy.deepcopy(model, memo)
    for module, other in zip(model.modules(), copied.modules(), strict=True):
        other.training = module.training
        if isinstance(module, fx.GraphModule) and has_hooks(module):
            hooks = {name: value for name, value in vars(module).items() if "_hooks" in name}
            vars(other).update(copy.deepcopy(hooks, memo))
    return copied


def _with_norms_apart(model: nn.Module) -> nn.Module:
    """``model`` with a norm and an activation in the place of each of timm's modules that are both, in eval mode."""
    norms = [module for module in model.modules() if _has_activation(module)]
    if not norms:
        return model
    network = find_regions(model)
    apart: dict[nn.Module, nn.Module] = {
        norm: nn.Sequential(_as_batch_norm(norm), norm.get_submodule("act")).eval()
        for norm in norms
        if network.only_calls(norm, model)
    }
    return _replace(model, apart)


def _has_activation(module: nn.Module) -> bool:
    """Whether it is a batch norm and an activation and nothing else."""
    kind = type(module)
    if kind.__name__ != "BatchNormAct2d" or not kind.__module__.startswith("timm.") or module.training:
        return False
    parts = module._modules
    return parts.keys() == {"drop", "act"} and type(parts["drop"]) is nn.Identity and not has_hooks(module)


def _as_batch_norm(norm: Any) -> nn.BatchNorm2d:
    """The norm alone, on the same tensors."""
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, "meta")
    plain._parameters.update(norm._parameters)
    plain._buffers.update(norm._buffers)
    return plain.eval()


def _check_state(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"its {name}" if name else "it"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"model must not be scripted yet, but {where} is; fuse first")
        if is_compiled(module):
            raise ValueError(f"model must not be compiled yet, but {where} is; use torch.compile(fuse(model))")
        if isinstance(module, DistributedDataParallel):
            raise ValueError(f"model must not be wrapped in DistributedDataParallel, but {where} is; fuse its .module")
        if module.training and any(isinstance(part, SPConv2d) for part in module.modules()):
            raise ValueError(f"model must be in eval mode, but {where} is in training mode; call model.eval() first")


@dataclass(eq=False)
class _Decision:
    """What becomes of one layer: with ``chain`` it is fused, by modules alone unless a ``scope`` is rewritten."""

    names: tuple[str, ...]
    chain: Chain | None = None
    region: Region | None = None
    scope: nn.Module | None = None
    reason: str = ""


@dataclass
class _Rewriting:
    """The graph of a module's forward, and the chains in it that fold."""

    graph: fx.Graph
    chains: list[Chain] = field(default_factory=list)


class _Plan:
    """What folds into the layers of ``model``, which carrying it out changes.

    Args:
        model: a network in eval mode.
        plain_norms: whether norms fold into plain convolutions too.
    """

    def __init__(self, model: nn.Module, plain_norms: bool) -> None:
        self.model = model
        self.decisions: dict[SPConv2d, _Decision] = {}
        self.rewritings: dict[nn.Module, _Rewriting] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, SPConv2d):
                decision = self.decisions.setdefault(module, _Decision((), reason=_obstacle(module)))
                decision.names = (*decision.names, name)
        self.network = find_regions(model)
        regions = self.network.regions
        sites = self._follow_calls(regions)
        owners = _owners(regions)
        self.norms = find_folded_norms(self.network, owners) if plain_norms else []
        for layer, decision in self.decisions.items():
            if not decision.reason:
                self._decide(layer, decision, sites.get(layer, []), owners)
        self._join_nested()
        for scope in dict.fromkeys(d.scope for d in self.decisions.values() if d.scope is not None):
            self._rewrite(scope)

    def _follow_calls(self, regions: list[Region]) -> dict[SPConv2d, list[tuple[Chain, Region]]]:
        sites: dict[SPConv2d, list[tuple[Chain, Region]]] = {}
        for region in regions:
            for layer, chain in self._chains(region):
                sites.setdefault(layer, []).append((chain, region))
        return sites

    def _chains(self, region: Region) -> list[tuple[SPConv2d, Chain]]:
        """The calls of layers that may be fused, in order, each with what follows; of two that are added
        to each other the first takes the sum."""
        found = []
        taken: set[fx.Node] = set()
        for node in region.graph.nodes:
            layer = region.module_of(node) if node.op == "call_module" else None
            if isinstance(layer, SPConv2d) and layer in self.decisions and not _obstacle(layer):
                chain = follow(node, region, taken)
                taken.update(chain.nodes)
                found.append((layer, chain))
        return found

    def _decide(
        self,
        layer: SPConv2d,
        decision: _Decision,
        sites: list[tuple[Chain, Region]],
        owners: dict[nn.Module, int],
    ) -> None:
        if not sites:
            decision.reason = "is not called in any forward that can be traced"
            return
        chain, region = sites[0]
        scope = chain.frames[-1].module
        decision.reason = chain.stopped
        if owners[layer] + self.network.callers[layer] > 1:
            decision.reason = "is shared by parts that are traced separately"
        elif any(c.signature != chain.signature or c.frames[-1].module is not scope for c, _ in sites):
            decision.reason = f"is called {len(sites)} times, and different things follow"
        elif len(chain.nodes) == 1:
            return
        elif exposed := self._exposure([c for c, _ in sites], region):
            decision.reason = exposed
        elif _are_read([c for c, _ in sites], region, self.network.regions):
            decision.reason = "has parameters, or is followed by what has, that a forward reads itself"
        elif self._is_looked_into([c for c, _ in sites], region, owners):
            decision.reason = "is called or followed by a module that another forward does not only call"
        elif any(frame.is_open for c, _ in sites for frame in c.inner_frames):
            frame = next(frame for c, _ in sites for frame in c.inner_frames if frame.is_open)
            decision.reason = (
                f"is called by {type(frame.module).__name__}.forward, whose optional arguments may change what follows"
            )
        elif not _is_made_of_modules([c for c, _ in sites], region, owners):
            if has_hooks(scope):
                decision.reason = f"is called by {type(scope).__name__}.forward, which has hooks"
                return
            decision.chain, decision.region, decision.scope = chain, region, scope
        else:
            decision.chain, decision.region = chain, region

    def _exposure(self, chains: list[Chain], region: Region) -> str:
        """What else may reach a part of chains that fold; empty if nothing does."""
        for node in (node for chain in chains for node in chain.nodes if node.op == "call_module"):
            module = region.module_of(node)
            if module in self.network.exposed:
                subject = "" if node is chains[0].nodes[0] else f"is followed by {region.name_of(node)}, which "
                return subject + self.network.exposed[module]
        return ""

    def _is_looked_into(self, chains: list[Chain], region: Region, owners: dict[nn.Module, int]) -> bool:
        """Whether anything does more than call a module of which less will be left: attributes are read, say."""
        if _is_made_of_modules(chains, region, owners):
            less = {region.module_of(node) for chain in chains for node in chain.nodes[1:]}
        else:
            less = {chains[0].frames[-1].module}
        layer = region.module_of(chains[0].nodes[0])
        return layer in self.network.asked or not all(self.network.only_calls(module, self.model) for module in less)

    def _join_nested(self) -> None:
        """Where the graph of one scope will hold the forward of another, it folds what is folded there, too."""
        while True:
            scopes = dict.fromkeys(d.scope for d in self.decisions.values() if d.scope is not None)
            inlined = {scope: self._containers(scope) - {scope} for scope in scopes}
            nested = {d: outer for d in self.decisions.values() for outer in scopes if d.scope in inlined[outer]}
            if not nested:
                return
            for decision, outer in nested.items():
                decision.scope = outer

    def _containers(self, scope: nn.Module) -> set[nn.Module]:
        """The modules whose forwards call what is folded in ``scope``, down from itself."""
        parts = set()
        for decision in self.decisions.values():
            if decision.scope is scope:
                assert decision.chain is not None
                assert decision.region is not None
                nodes = (node for node in decision.chain.nodes if node.op == "call_module")
                parts |= {decision.region.module_of(node) for node in nodes}
        return {m for m in scope.modules() if m not in parts and parts & set(m.modules())}

    def _rewrite(self, scope: nn.Module) -> None:
        """Trace the forward of ``scope`` alone, down to the modules that its chains are made of."""
        planned = {layer: d for layer, d in self.decisions.items() if d.scope is scope}
        tracer = Tracer(inlined=self._containers(scope))
        try:
            with unchanged(scope) as changes:
                graph = trace(scope, tracer)
        except Exception as error:  # a forward may raise anything at a symbol
            obstacle = str(error) or type(error).__name__
        else:
            region = Region(scope, graph, tracer.found_leaves, self._name_of(scope))
            obstacle = "it makes a tensor" if _makes_tensors(region) else ""
            if not obstacle and (changes.attributes or changes.contents):
                obstacle = "it keeps what it computes on a module"
        if obstacle:
            for decision in planned.values():
                decision.chain = None
                decision.reason = f"{type(scope).__name__}.forward cannot be traced alone: {obstacle}"
            return
        rewriting = _Rewriting(graph)
        found: dict[SPConv2d, list[Chain]] = {}
        for layer, chain in self._chains(region):
            found.setdefault(layer, []).append(chain)
        for layer, decision in planned.items():
            chains = found.get(layer, [])
            assert decision.chain is not None
            if chains and all(chain.signature == decision.chain.signature for chain in chains):
                rewriting.chains += chains
            else:
                decision.chain = None
                decision.reason = chains[0].stopped if chains else f"is not called by {type(scope).__name__} itself"
        self.rewritings[scope] = rewriting

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, other in self.model.named_modules() if other is module)

    def report(self) -> Fusion:
        fused: list[Fold] = []
        kept: list[Fold] = []
        for layer, decision in self.decisions.items():
            parts = ["branch norms"] if layer.branch_norm and not _obstacle(layer) else []
            chain = decision.chain
            if chain is not None and decision.region is not None:
                parts += [decision.region.name_of(chain.nodes[1])] if chain.norm is not None else []
                parts += ["residual"] if chain.residual is not None else []
                parts += [chain.activation] if chain.activation != "none" else []
            fold = Fold(decision.names, tuple(parts), decision.reason)
            (fused if parts else kept).append(fold)
        return Fusion(tuple(fused), tuple(kept), tuple(self.norms))

    def carry_out(self) -> nn.Module:
        """The network that comes out, made of the modules of ``model``."""
        replaced: dict[nn.Module, nn.Module] = {}
        for layer, decision in self.decisions.items():
            chain, region = decision.chain, decision.region
            if chain is None or region is None:
                if layer.branch_norm and not _obstacle(layer):
                    replaced[layer] = FusedSPConv2d(layer)
                continue
            has_residual = chain.residual is not None
            replaced[layer] = FusedSPConv2d(
                layer, chain.norm, chain.activation, residual=has_residual, in_place=chain.in_place
            )
            if decision.scope is None:
                replaced.update({region.module_of(node): nn.Identity().eval() for node in chain.nodes[1:]})
        for norm in self.norms:
            replaced.update(norm.replacements())
        model = _replace(self.model, replaced)
        for scope in sorted(self.rewritings, key=lambda module: len(list(module.modules()))):  # inner ones first
            rewriting = self.rewritings[scope]
            if rewriting.chains:
                model = _replace(model, {scope: _rewritten(scope, rewriting)})
        return model


def _obstacle(layer: SPConv2d) -> str:
    """Why nothing can be folded into a layer; empty if something may."""
    if type(layer) is not SPConv2d:
        return f"is a {type(layer).__name__}, a subclass of SPConv2d that may compute something else"
    if has_hooks(layer):
        return "has hooks"
    if layer.branch_norm and not folds(layer):
        return (
            "has norms in its branches that are no affine maps: in training mode, untracked, hooked or of another kind"
        )
    return ""


def _owners(regions: list[Region]) -> dict[nn.Module, int]:
    """In how many regions a module stands, not counting those whose graphs have a module around it as a node."""
    count: dict[nn.Module, int] = {}
    for region in regions:
        held = {region.root}
        pending = [region.root]
        while pending:
            module = pending.pop()
            new = [child for child in module.children() if child not in held]
            held.update(new)
            pending += [child for child in new if child not in region.leaves]
        for module in held:
            count[module] = count.get(module, 0) + 1
    return count


def _are_read(chains: list[Chain], region: Region, regions: list[Region]) -> bool:
    """Whether any forward reads parameters or buffers of what is folded, which will be gone."""
    modules = {region.module_of(node) for chain in chains for node in chain.nodes if node.op == "call_module"}
    folded = {id(t) for m in modules for t in (*m.parameters(), *m.buffers())}
    return any(
        node.op == "get_attr" and id(attribute(node, other)) in folded
        for other in regions
        for node in other.graph.nodes
    )


def _is_made_of_modules(chains: list[Chain], region: Region, owners: dict[nn.Module, int]) -> bool:
    """Whether all that is folded are modules that nothing else calls: then nothing but modules need change."""
    folded = {node for chain in chains for node in chain.nodes[1:]}
    if any(chain.residual is not None for chain in chains) or any(node.op != "call_module" for node in folded):
        return False
    modules = {region.module_of(node) for node in folded}
    calls = {node for node in region.graph.nodes if node.op == "call_module" and region.module_of(node) in modules}
    return calls == folded and all(owners[module] == 1 for module in modules)


def _makes_tensors(region: Region) -> bool:
    """Whether a forward makes tensors itself: traced they are constants, even if they are random."""
    return any(node.op == "get_attr" and attribute(node, region) is None for node in region.graph.nodes)


def _replace(model: nn.Module, replaced: dict[nn.Module, nn.Module]) -> nn.Module:
    """``model`` with other modules in the places of some."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in replaced:
                parent._modules[key] = replaced[child]
    return replaced.get(model, model)


def _rewritten(scope: nn.Module, rewriting: _Rewriting) -> fx.GraphModule:
    """``scope`` as a graph in which fused layers, which are in their places already, compute what followed them."""
    graph = rewriting.graph
    became: dict[fx.Node, fx.Node] = {}
    for chain in rewriting.chains:
        call, last = chain.nodes[0], chain.nodes[-1]
        position, arguments = call, call.args
        if chain.residual is not None:
            residual = became.get(chain.residual, chain.residual)  # may be what another layer computes now
            position = next(node for node in chain.nodes if residual in node.all_input_nodes)
            arguments = (*call.args, residual)
        with graph.inserting_before(position):
            fused = graph.call_module(str(call.target), arguments)
        became[last] = fused
        last.replace_all_uses_with(fused)
        for node in reversed(chain.nodes):
            graph.erase_node(node)
    return fx.GraphModule(scope, graph, class_name=type(scope).__name__)
