"""A layer in a graph that ``torch.fx`` traces: a call, not what it computes, as the modules of ``torch.nn`` are."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from .hooks import has_hooks


def is_symbol(*arguments: object) -> bool:
    """Whether any of them is one of ``torch.fx``."""
    return any(isinstance(argument, fx.Proxy) for argument in arguments)


def call_of(module: nn.Module, *arguments: Any) -> Any:
    """The symbol of what the layer ``module`` returns, one of whose ``arguments`` is a symbol.

    Hooks, and the forward of a class that is derived from the layer's, are traced around that, and so are not to be run
    again inside of it.

    Raises:
        TypeError: the layer is all that is traced.
    """
    tracer = next(argument for argument in arguments if isinstance(argument, fx.Proxy)).tracer
    assert isinstance(tracer, fx.Tracer)
    path = tracer.path_of_module(module)
    if not path:
        raise TypeError(
            f"root must be a network for torch.fx to trace, got {type(module).__name__} alone, which is one call: "
            "trace torch.nn.Sequential(layer)"
        )
    if type(module) is _own_class(module) and not has_hooks(module):
        return tracer.create_proxy("call_module", path, arguments, {})
    layer = tracer.create_proxy("get_attr", path, (), {})
    return tracer.create_proxy("call_function", forward_alone, (layer, *arguments), {})


def forward_alone(layer: nn.Module, *arguments: Any) -> Any:
    """What the layer's own class computes, without hooks and without what derived classes add."""
    return _own_class(layer).forward(layer, *arguments)


def _own_class(layer: nn.Module) -> Any:
    """The class of this package that ``layer`` is of."""
    return next(kind for kind in type(layer).__mro__ if kind.__module__.partition(".")[0] == __package__)
