"""Folding batch norms into the plain convolutions before them, for inference."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..branch_norm import norm_misfit
from ..hooks import has_hooks
from .chains import Chain
from .regions import Network, Region, attribute


@dataclass(frozen=True, eq=False)
class FoldedNorm:
    """An ``nn.Conv2d`` and the batch norm that folds into it.

    Attributes:
        convolution, norm: the modules.
        names: of the two in the network.
    """

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d | nn.SyncBatchNorm
    names: tuple[str, str]

    def __str__(self) -> str:
        return " <- ".join(self.names)

    def replacements(self) -> dict[nn.Module, nn.Module]:
        """What takes the places of the two, by PyTorch's own folding."""
        convolution = fuse_conv_bn_eval(self.convolution, self.norm)
        return {self.convolution: convolution, self.norm: nn.Identity().eval()}


def find_folded_norms(network: Network, owners: dict[nn.Module, int]) -> list[FoldedNorm]:
    """The norms of a network whose only input is the result of an ``nn.Conv2d`` that nothing else reads.

    Both are called once and nothing else reads their parameters; hooked and parametrized ones and subclasses stay.

    Args:
        network: its graphs.
        owners: in how many of them a module stands.
    """
    found, regions = [], network.regions
    read = {id(attribute(node, region)) for region in regions for node in region.graph.nodes if node.op == "get_attr"}
    for region in regions:
        calls = Counter(region.module_of(node) for node in region.graph.nodes if node.op == "call_module")
        for node in region.graph.nodes:
            norm = _norm_behind(node, region)
            if norm is None:
                continue
            convolution = region.module_of(node)
            user = next(iter(node.users))
            once = all(
                calls[module] == 1 and owners[module] == 1 and module not in network.exposed
                for module in (convolution, norm)
            )
            state = (t for module in (convolution, norm) for t in (*module.parameters(), *module.buffers()))
            alone = not any(id(t) in read for t in state) and network.only_calls(norm, region.root)
            if once and alone and not any(f.is_open for f in Chain([node, user]).inner_frames):
                assert isinstance(convolution, nn.Conv2d)
                found.append(FoldedNorm(convolution, norm, (region.name_of(node), region.name_of(user))))
    return found


def _norm_behind(node: fx.Node, region: Region) -> nn.BatchNorm2d | nn.SyncBatchNorm | None:
    """The norm that folds into the convolution ``node``, as far as the two themselves tell."""
    if node.op != "call_module" or len(node.users) != 1:
        return None
    convolution, user = region.module_of(node), next(iter(node.users))
    if type(convolution) is not nn.Conv2d or has_hooks(convolution) or user.op != "call_module":
        return None
    norm = region.module_of(user)
    if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)) or user.args != (node,) or user.kwargs:
        return None
    return None if norm_misfit(norm, convolution.weight, convolution.out_channels) else norm
