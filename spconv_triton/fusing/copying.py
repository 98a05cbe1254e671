"""The copy of a network that is fused."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

from ..hooks import ON_CALLS, ON_STATE, has_hooks
from ..surgery import replace
from .regions import find_regions


def copied(model: nn.Module) -> nn.Module:
    """A copy in the same modes and with the same hooks: that of a ``torch.fx.GraphModule`` is a new one."""
    memo: dict[int, Any] = {}  # by which hooks of the copy see the copy
    twin = copy.deepcopy(model, memo)
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        other.training = module.training
        if isinstance(module, fx.GraphModule) and has_hooks(module):
            hooks = {name: vars(module)[name] for name in (*ON_CALLS, *ON_STATE)}
            vars(other).update(copy.deepcopy(hooks, memo))
    return twin


def with_norms_apart(model: nn.Module) -> nn.Module:
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
    return replace(model, apart)


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
