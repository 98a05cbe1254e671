"""A name for everything that decides a kernel's machine code: while it stays, so does the code.

Triton's own key holds the line at which a kernel starts, comments and the paths of installed files, none of which
changes an instruction. Here a kernel counts by its syntax.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
from typing import Any

import triton
from triton import knobs
from triton.runtime.jit import DependenciesFinder, JITCallable

from benchmarks.machine_code import compiling_for, jit_function

LENGTH = 16
"""Hexadecimal digits of a fingerprint: 64 bits, for thousands of kernels."""


class _Dependencies(DependenciesFinder):
    """Triton's rules of what a kernel depends on, with the syntax of what it calls in place of Triton's key."""

    def _update_hash(self, func: JITCallable) -> None:
        self.hasher.update(f"{syntax(func)} {getattr(func, 'noinline', False)}".encode())


@functools.cache
def syntax(function: JITCallable) -> str:
    """Of a jit function, all that it calls and the globals that they read; comments and docstrings do not count."""
    tree = function.parse()
    body = tree.body[0].body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and len(body) > 1:
        del body[0]
    found = _Dependencies(
        function.__name__,
        globals=function.__globals__,
        nonlocals=inspect.getclosurevars(function.fn).nonlocals,
        src=ast.unparse(tree),
    )
    found.visit(tree)
    values = sorted((name, repr(value)) for (name, _), (value, _) in found.used_global_vals.items())
    return hashlib.sha256(f"{found.ret} {values}".encode()).hexdigest()


def fingerprint(kernel: Any, target: str, config: triton.Config, *args: Any, **constants: Any) -> str:
    """Of what :func:`.machine_code.compile_kernel` would compile from the same arguments.

    It holds the syntax, the specialised signature, the constants, the compiler's options, the target and Triton's
    version.
    """
    described: list[dict[str, Any]] = []

    def describe(compile: dict[str, Any], **_: Any) -> bool:
        described.append(json.loads(compile["specialization_data"]))
        return True  # do not compile

    function = jit_function(kernel)
    with compiling_for(target, "describe"), knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = describe
        function.warmup(*args, grid=(1,), **constants, **config.all_kwargs())
    (specialised,) = described
    del specialised["name"], specialised["key"]  # where the kernel is, and all the same again, with paths
    specialised["options"].pop("extern_libs")  # paths; the libraries are Triton's
    decisive = [triton.__version__, syntax(function), specialised]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:LENGTH]
