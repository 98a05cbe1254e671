"""What folds into the SPConv layers of a network, found first and carried out then."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn

from ..branch_norm import folds
from ..fused import FusedSPConv2d
from ..hooks import has_hooks
from ..modules import SPConv2d
from ..surgery import replace
from .chains import Chain, follow
from .module_changes import unchanged
from .plain_norms import find_folded_norms
from .regions import Region, Tracer, attribute, find_regions, trace
from .report import Fold, Fusion


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


class Plan:
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
        model = replace(self.model, replaced)
        for scope in sorted(self.rewritings, key=lambda module: len(list(module.modules()))):  # inner ones first
            rewriting = self.rewritings[scope]
            if rewriting.chains:
                model = replace(model, {scope: _rewritten(scope, rewriting)})
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
