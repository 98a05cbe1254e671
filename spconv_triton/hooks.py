"""Whether a module is more than its class says."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.modules import module as everywhere

HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at, or changes, what goes into ``module`` or comes out; of this module or of every one."""
    if any(getattr(module, f"_{name}") or getattr(everywhere, f"_global_{name}", None) for name in HOOKS):
        return True
    return "forward" in vars(module)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` wraps the module, or its own ``compile`` was called."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # the wrapper's class, which costs a second to import
    return module._compiled_call_impl is not None or (dynamo is not None and isinstance(module, dynamo.OptimizedModule))
