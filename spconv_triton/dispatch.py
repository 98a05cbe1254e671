"""Which implementation runs: the one place that decides."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .arguments import check_one_of

BACKENDS = ("auto", "triton", "native", "reference")


class Path(NamedTuple):
    """One way to compute a layer.

    Attributes:
        backend: whose it is.
        name: what :func:`spconv_triton.explain` calls it.
        device, dtypes, layers: what it is taken for.
        kernel: the launch that it is known by; empty where ATen computes.
    """

    backend: str
    name: str
    device: str
    dtypes: str
    layers: str
    kernel: str


PATHS = (
    Path(
        "triton",
        "batch norm",
        "any GPU",
        "float32, float16, bfloat16",
        "batch norms in both branches, in training",
        "branches_forward",
    ),
    Path("triton", "branch", "any GPU", "float32, float16, bfloat16", "alpha = 1, other norms", "branch_forward"),
    Path(
        "triton",
        "descriptor",
        "CUDA, compute capability 9.x or 10.x",
        "float16, bfloat16, float32 as TF32",
        "3 x 3, padding 1, stride 1, or stride 2 on even sizes; channels in multiples that fill its tiles",
        "onepass_descriptor",
    ),
    Path("triton", "flat", "any GPU", "float32, float16, bfloat16", "any", "onepass_forward"),
    Path("native", "batch norm", "CPU", "float32, float64", "batch norms in both branches, in training", ""),
    Path(
        "native",
        "gate first",
        "CPU",
        "float32, float64, bfloat16",
        "maps of 4 MB and eight output pixels per input channel; in float64 or with gradients more output pixels than "
        "input channels",
        "",
    ),
    Path(
        "native",
        "merged weights",
        "CPU",
        "float32, bfloat16",
        "at most 16 representative channels; stride 1, or 2 on even sizes",
        "",
    ),
    Path(
        "native",
        "folded weights",
        "CPU",
        "float32, bfloat16",
        "at most two groups; stride 1, or 2 on even sizes",
        "",
    ),
    Path("native", "prepared weights", "CPU", "float32, bfloat16", "any that oneDNN convolves", ""),
    Path("native", "given weights", "any", "any", "any", ""),
    Path("reference", "reference", "any", "any", "any", ""),
)
"""The paths. ``choose`` finds the backend, and of its rows the first that matches is taken: within Triton's the launch
of the layer asks ``launch.descriptor.can_run`` and ``launch.gradients_descriptor.can_run``, which hold their rows'
conditions, as ``native.weights`` and ``native.folding`` do of ATen's. All of ATen's but the first and the last are for
layers without norms, or with norms that are folded."""


HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether triton is installed. It is imported when a layer is about to run on it, which takes longer than all of this
package."""

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in (
    "1",
    "true",
    "yes",
    "on",
    "y",
)
"""Triton runs its kernels in NumPy, on tensors in host memory. Read once: kernels are built for one or the other."""

_assumed: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar("assumed capability", default=None)


@contextlib.contextmanager
def assuming(capability: tuple[int, int] | None) -> Iterator[None]:
    """Decide as if CUDA devices and ``meta`` had this compute capability: to ask about a GPU that is not there."""
    token = _assumed.set(capability)
    try:
        yield
    finally:
        _assumed.reset(token)


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None for anything else, AMD's included."""
    assumed = _assumed.get()
    if assumed is not None and device.type in ("cuda", "meta"):
        return assumed
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return _capability(device)


@functools.cache  # PyTorch takes microseconds to tell
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def has_tf32(device: torch.device) -> bool:
    """Whether Triton multiplies float32 in TF32 there: on NVIDIA's GPUs from compute capability 8.0 on, of AMD's on
    gfx942."""
    found = capability(device)
    if found is not None:
        return found[0] >= 8
    if device.type != "cuda" or torch.version.hip is None:
        return True
    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0] == "gfx942"


TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose(x: Tensor, backend: str = "auto") -> str:
    """The backend that serves ``x``: ``"triton"``, ``"native"`` or ``"reference"``.

    ``auto`` takes the Triton kernels wherever they run at full speed: a GPU (CUDA or HIP), triton installed, and a
    dtype that they have; otherwise ATen. The interpreter is for tests, so ``auto`` never takes it. Nor are the kernels
    taken, asked for or not, where every operation :func:`is_transformed`: ATen's are, to any order.

    Raises:
        ValueError: an unknown backend, or ``"triton"`` where it cannot run, with the reason.
    """
    check_one_of("backend", backend, BACKENDS)
    if backend == "auto":
        backend = "triton" if x.is_cuda and _why_not_triton(x) is None else "native"
    elif backend == "triton":
        reason = _why_not_triton(x)
        if reason is not None:
            raise ValueError(f"backend='triton' cannot run here: {reason}; legal: 'auto', 'native', 'reference'")
    return "native" if backend == "triton" and is_transformed() else backend


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation looks into every operation, and needs plain ones."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_watched() -> bool:
    """Whether a dispatch mode sees each operation in eager mode, and may count, replace or keep what it returns, which
    then is not to be written over: selective checkpointing, fake tensors, ``make_fx``, FLOP counters."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def needs_plain_operations(tensors: Iterable[Any]) -> bool:
    """Whether the layer is to be computed in plain operations: :func:`is_transformed`, :func:`is_watched`, or a tensor
    of a class that takes each of them itself (``DTensor``), and need not have oneDNN's or write in place."""
    return is_transformed() or is_watched() or any(map(_is_wrapper, tensors))


def _is_wrapper(tensor: Any) -> bool:
    return type(tensor) not in (Tensor, torch.nn.Parameter) and is_traceable_wrapper_subclass(tensor)


def needs_plain_backward(grad: Tensor) -> bool:
    """Whether a backward is to be made of plain operations: one that will itself be differentiated, that is compiled
    (compiled autograd), or that takes many gradients at a time (``is_grads_batched=True``, ``torch.vmap`` around
    ``torch.autograd.grad``), whose tensors know neither memory formats nor writing in place."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return True
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.is_functorch_wrapped_tensor(grad)


def is_exporting() -> bool:
    """Whether ``torch.export`` traces: as of ``torch.compiler``, but the compiler of PyTorch 2.11 always says yes."""
    return torch.compiler._is_exporting_flag


def why_no_triton() -> str | None:
    """Why triton cannot be imported, None if it can: it may be missing, or installed and broken."""
    if not HAS_TRITON:
        return "triton is not installed"
    if not _import_errors:
        try:
            import triton  # noqa: F401, read here by torch.compile, which cannot trace importlib
        except Exception as error:  # a library that does not load, or a version that does not fit
            _import_errors.append(f"triton does not import: {error}")
    return _import_errors[0] if _import_errors else None


_import_errors: list[str] = []


def _why_not_triton(x: Tensor) -> str | None:
    if not HAS_TRITON:
        return why_no_triton()
    if x.dtype not in TRITON_DTYPES:
        return f"its kernels take float32, bfloat16 and float16, and x is {x.dtype}"
    if not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
        return f"x is on {x.device}, not on a GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, for tests)"
    return why_no_triton()
