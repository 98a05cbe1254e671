"""Registering an operator whose body ``torch.compile`` sees through."""

from __future__ import annotations

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
