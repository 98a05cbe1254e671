"""What is done to somebody else's network, whatever for."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .hooks import is_compiled


def check_is_plain(model: nn.Module, verb: str) -> None:
    """Refuse networks whose modules are not what runs when they are called.

    Args:
        verb: what would be done to it: the function's name.

    Raises:
        ValueError: a model that is scripted, compiled, wrapped in DDP or sharded by FSDP, or holds what is.
    """
    for name, module in model.named_modules():
        where = f"its {name}" if name else "it"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"model must not be scripted yet, but {where} is; {verb} first")
        if is_compiled(module):
            raise ValueError(f"model must not be compiled yet, but {where} is; use torch.compile({verb}(model))")
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"model must not be wrapped in DistributedDataParallel yet, but {where} is; {verb} its .module, then "
                "wrap it anew"
            )
        if _is_sharded(module):
            raise ValueError(f"model must not be sharded by FSDP yet, but {where} is; {verb} first")


def _is_sharded(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # which takes a while to import
    return fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))


def replace(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """``model`` with other modules in the places of some, wherever they stand in it; or what takes its own place."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in replaced:
                parent._modules[key] = replaced[child]
    return replaced.get(model, model)
