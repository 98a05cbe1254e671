"""Registering operators: those whose body ``torch.compile`` sees through, and opaque ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._library import triton as torch_triton
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.library import CustomOpDef, custom_op

from .dispatch import INTERPRETED

NAMESPACE = "spconv_triton"


def traceable_op(name: str, kernels: Sequence[object]) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Decorator that registers ``spconv_triton::name`` with the decorated function as its body.

    ``torch.library.triton_op`` does the same, but imports Inductor at once, which adds about a second to importing
    this package, and finds the kernels by reading source. Here they are named, so that compiled code cached on disk
    is keyed by their source.

    In eager mode the body runs as it is. When AOTAutograd traces, the operator is replaced by its body, so Inductor
    sees kernels and ATen. ``torch.export`` keeps the operator. Interpreted kernels cannot be traced, and then the
    operator stays opaque.
    """

    def register(body: Callable[..., Any]) -> CustomOpDef:
        def eager(*args: Any, **kwargs: Any) -> Any:
            with torch_triton.set_wrap_triton_enabled(False):
                return body(*args, **kwargs)

        qualified = f"{NAMESPACE}::{name}"
        schema = torch.library.infer_schema(body, mutates_args=())
        operator = custom_op(qualified, eager, mutates_args=(), schema=schema)
        torch_triton.triton_ops_to_kernels[qualified] = list(kernels)

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


def opaque_op(name: str, *, mutates: Sequence[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that registers ``spconv_triton::name``, writing to ``mutates``, as an operator that is never traced.

    Called from the body of a :func:`traceable_op` in eager mode, the decorated function runs at once: the dispatcher
    has been there for the enclosing operator, and costs several microseconds a call.
    """

    def register(body: Callable[..., None]) -> Callable[..., None]:
        schema = torch.library.infer_schema(body, mutates_args=mutates)
        operator = custom_op(f"{NAMESPACE}::{name}", body, mutates_args=mutates, schema=schema)

        @functools.wraps(body)
        def call(*args: Any) -> None:
            (operator if torch_triton.is_wrap_triton_enabled() else body)(*args)

        return call

    return register
