"""Registering operators: those whose body ``torch.compile`` sees through, and opaque ones."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._library import triton as torch_triton
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.library import CustomOpDef, custom_op

from .dispatch import INTERPRETED

NAMESPACE = "spconv_triton"

bodies: dict[str, Callable[..., Any]] = {}
"""The body of each traceable operator, by its qualified name: what :mod:`spconv_triton.explain` looks into."""

descriptions: dict[str, Callable[..., str]] = {}
"""What an opaque operator would launch for given arguments, by its qualified name, likewise."""


def traceable_op(name: str, kernels: Callable[[], Sequence[object]]) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Decorator that registers ``spconv_triton::name`` with the decorated function as its body.

    ``torch.library.triton_op`` does the same, but imports Inductor at once, which adds about a second to importing
    this package, and finds the kernels by reading source. Here ``kernels`` names them when it is called, so that
    compiled code cached on disk is keyed by their source.

    In eager mode the body runs as it is. When AOTAutograd traces, the operator is replaced by its body, so Inductor
    sees kernels and ATen. ``torch.export`` keeps the operator. Interpreted kernels cannot be traced, and then the
    operator stays opaque.
    """

    def register(body: Callable[..., Any]) -> CustomOpDef:
        def eager(*args: Any, **kwargs: Any) -> Any:
            # Triton launches on the current device, which need not be the tensors'.
            with torch_triton.set_wrap_triton_enabled(False), torch.cuda.device_of(args[0]):
                return body(*args, **kwargs)

        qualified = f"{NAMESPACE}::{name}"
        schema = torch.library.infer_schema(body, mutates_args=())
        operator = custom_op(qualified, eager, mutates_args=(), schema=schema)
        torch_triton.triton_ops_to_kernels[qualified] = LateKernels(kernels)  # type: ignore[assignment]
        bodies[qualified] = body

        def trace(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
            from torch.export import _trace  # loaded by whoever exports; of no use to anyone else

            if _trace.custom_triton_ops_decomposition_disabled():
                return mode.__torch_dispatch__(op, types, args, kwargs)
            with mode:
                return body(*args, **kwargs)

        if not INTERPRETED:
            operator.register_torch_dispatch(FunctionalTensorMode, trace)
        return operator

    return register


def register_autocast(operator: CustomOpDef, cast: Callable[..., tuple[Any, ...]]) -> None:
    """Under ``torch.autocast`` on a CPU or a GPU, ``operator`` is called with what ``cast`` makes of its arguments.

    ``CustomOpDef.register_autocast`` casts all of them, to a dtype that is fixed when it is called.
    """
    overload = operator._opoverload

    def rule(*args: Any) -> Any:
        args = cast(*args)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return overload(*args)

    for key in _AUTOCAST_KEYS:
        _library.impl(operator._name, rule, key)


_AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_AUTOCAST = _AUTOCAST | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


class OpaqueOp:
    """``spconv_triton::name``, an operator that is never traced.

    Called from the body of a :func:`traceable_op` in eager mode, it runs at once: the dispatcher has been there for the
    enclosing operator, and costs several microseconds a call.

    Args:
        name: of the operator.
        schema: its arguments and results, as of ``torch.library.define``. Better return a tensor than mutate one:
            Inductor fills an uninitialised tensor before an operator mutates it.
        body: ``"module:function"``, imported when it is first called: compiled code from a cache on disk may call the
            operator before anything else has loaded its kernels.
        fake: likewise, of the results without their values.
        description: likewise, says what it would launch for given arguments: blocks and grid.
    """

    def __init__(self, name: str, schema: str, body: str, fake: str, description: str | None = None) -> None:
        self.body = Late(body)
        self.operator = custom_op(f"{NAMESPACE}::{name}", self._run, mutates_args=(), schema=schema)
        self.operator.register_fake(Late(fake).__call__)
        self.packet = self.operator._opoverload.overloadpacket
        if description is not None:
            descriptions[self.operator._qualname] = Late(description)

    def _run(self, *args: Any) -> Any:
        with torch.cuda.device_of(args[0]):  # as above: not every compiler's code sees to it
            return self.body(*args)

    def __call__(self, *args: Any) -> Any:
        return (self.operator if torch_triton.is_wrap_triton_enabled() else self.body)(*args)


class Late:
    """The function ``"module:function"``, whose module is imported when it is first called."""

    def __init__(self, name: str) -> None:
        self.module, _, self.name = name.partition(":")

    @functools.cached_property
    def _imported(self) -> Any:
        return importlib.import_module(self.module)

    def __call__(self, *args: Any) -> Any:
        return getattr(self._imported, self.name)(*args)


class LateKernels(Sequence[object]):
    """The kernels that ``find`` returns when they are first asked for."""

    def __init__(self, find: Callable[[], Sequence[object]]) -> None:
        self._find = find

    @functools.cached_property
    def _found(self) -> Sequence[object]:
        return self._find()

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: Any) -> Any:
        return self._found[index]
