"""Whether a module is more than its class says."""

from __future__ import annotations

import sys

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at, or changes, what goes into ``module`` or comes out."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names) or "forward" in vars(module)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` wraps the module, or its own ``compile`` was called."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # the wrapper's class, which costs a second to import
    return module._compiled_call_impl is not None or (dynamo is not None and isinstance(module, dynamo.OptimizedModule))
