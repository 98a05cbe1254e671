"""The norms in the branches of a layer, folded into its weights once for many inferences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .branch_norm import Branches, fold_branch_norms
from .dispatch import needs_plain_operations
from .watch import Watch, can_watch

Folded = tuple[Tensor, Tensor, Tensor | None, Tensor]
"""Of :func:`.branch_norm.fold_branch_norms`."""


class _Kept(NamedTuple):
    eps: list[float]
    watch: Watch
    folded: Folded


class FoldedNorms:
    """What a layer remembers of its norms on a CPU, until they or its weights change. Copies and pickles forget."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def __reduce__(self) -> tuple[type[FoldedNorms], tuple[()]]:
        return FoldedNorms, ()

    def forget(self) -> None:
        self._kept = None

    def fold(self, layer: Branches) -> tuple[Folded, bool]:
        """:func:`.branch_norm.fold_branch_norms` of the layer, and whether that is what it was or will be again."""
        weights = (layer.weight_gwc, layer.weight_pwc, layer.weight_redundant)
        if torch.is_grad_enabled() or needs_plain_operations(weights):
            return fold_branch_norms(layer), False
        norms = [norm for norm in (layer.norm_representative, layer.norm_redundant) if norm is not None]
        tensors = [*weights]
        eps = []
        for norm in norms:
            assert isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
            tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
            eps.append(norm.eps)
        if not layer.weight_gwc.is_cpu or not can_watch(tensors):
            return fold_branch_norms(layer), False
        kept = self._kept
        if kept is None or kept.eps != eps or not kept.watch.holds(tensors):
            with torch.inference_mode(False), torch.no_grad():  # whose tensors have versions, and can be watched
                kept = _Kept(eps, Watch(tensors), fold_branch_norms(layer))
            self._kept = kept
        return kept.folded, True
