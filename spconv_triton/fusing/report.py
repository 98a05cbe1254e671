"""What :func:`spconv_triton.fuse` says that it does."""

from __future__ import annotations

from dataclasses import dataclass

from .plain_norms import FoldedNorm


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
