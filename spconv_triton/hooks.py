"""Whether a module is more than its class says."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.modules import module as everywhere

KINDS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
"""Of hooks on a call, on one module or on all."""

ON_CALLS = (
    *(f"_{kind}" for kind in KINDS),
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_is_full_backward_hook",
)
"""Attributes of a module in which its hooks on calls are."""

ON_STATE = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Those in which its hooks on saving and loading are."""


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at, or changes, what goes into ``module`` or comes out; of this module or of every one."""
    if any(getattr(module, f"_{name}") or getattr(everywhere, f"_global_{name}", None) for name in KINDS):
        return True
    return "forward" in vars(module)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` wraps the module, or its own ``compile`` was called."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # the wrapper's class, which costs a second to import
    return module._compiled_call_impl is not None or (dynamo is not None and isinstance(module, dynamo.OptimizedModule))
