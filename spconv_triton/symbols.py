"""A layer in a graph that ``torch.fx`` traces: a call, not what it computes, as the modules of ``torch.nn`` are."""

from __future__ import annotations

from typing import Any

from torch import fx, nn


def is_symbol(*arguments: object) -> bool:
    """Whether any of them is one of ``torch.fx``."""
    return any(isinstance(argument, fx.Proxy) for argument in arguments)


def call_of(module: nn.Module, *arguments: Any) -> Any:
    """The symbol of what ``module`` returns, one of whose ``arguments`` is a symbol."""
    tracer = next(argument for argument in arguments if isinstance(argument, fx.Proxy)).tracer
    assert isinstance(tracer, fx.Tracer)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})
