"""Whether a module is more than its class says."""

from __future__ import annotations

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at, or changes, what goes into ``module`` or comes out."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names) or "forward" in vars(module)
