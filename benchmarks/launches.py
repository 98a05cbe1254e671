"""What a layer would launch: kernels, arguments, configurations and grids, without running or allocating anything.

The launch code itself runs, on tensors of the ``meta`` device, and every kernel that it comes to is written down
instead of launched. So what is compiled, counted and modelled from here is what a GPU would be sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from cases import Case
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from triton.runtime import Autotuner, JITFunction

from benchmarks.machine_code import TARGETS, compile_kernel
from spconv_triton import dispatch, launch
from spconv_triton.geometry import Geometry

CAPABILITIES: dict[str, tuple[int, int] | None] = {
    "sm_80": (8, 0),
    "sm_90": (9, 0),
    "sm_100": (10, 0),
    "sm_120": (12, 0),
    "gfx942": None,
}
"""The compute capability of each of :data:`benchmarks.machine_code.TARGETS`; AMD has none."""

assert CAPABILITIES.keys() == TARGETS.keys()


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: as Triton compiles it.
        arguments: by name, what is known at run time; tensors are on ``meta``.
        constants: by name, what is compiled in, blocks apart.
        configs: those that may be launched: the tuner's after pruning, or the one that the launch names.
        grid: of a configuration.
    """

    kernel: JITFunction
    arguments: dict[str, Any]
    constants: dict[str, Any]
    configs: tuple[triton.Config, ...]
    grid: Callable[[triton.Config], tuple[int, ...]] = field(repr=False)

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def programs(self, config: triton.Config) -> int:
        """How many run."""
        total = 1
        for side in self.grid(config):
            total *= side
        return total


@contextlib.contextmanager
def recording(capability: tuple[int, int] | None) -> Iterator[list[Launch]]:
    """Every kernel that would be launched on a device of this capability, in order.

    Args:
        capability: of the CUDA device that ``meta`` tensors are taken to be on; None for any other.
    """
    found: list[Launch] = []

    def note(kernel: JITFunction, configs: list[triton.Config], args: Any, grid: Any, values: dict[str, Any]) -> None:
        values.pop("launch_pdl", None)  # says what OVERLAP does, a constant
        named = dict(zip(kernel.arg_names, args, strict=False)) | values
        constexprs = {p.name for p in kernel.params if p.is_constexpr}
        constants = {name: value for name, value in named.items() if name in constexprs}
        arguments = {name: value for name, value in named.items() if name not in constexprs}

        def size(config: triton.Config) -> tuple[int, ...]:
            return tuple(grid({**named, **config.all_kwargs()})) if callable(grid) else tuple(grid)

        found.append(Launch(kernel, arguments, constants, tuple(configs), size))

    def tuned(self: Autotuner, *args: Any, grid: Any, warmup: bool = False, **values: Any) -> None:  # noqa: ARG001
        kernel = self.fn
        while not isinstance(kernel, JITFunction):
            kernel = kernel.fn
        named = dict(zip(kernel.arg_names, args, strict=False))
        note(kernel, self.early_config_prune(self.configs, named, **values), args, grid, values)

    def plain(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **values: Any) -> None:  # noqa: ARG001
        options = {name: values.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in values}
        note(self, [triton.Config({}, **options)], args, grid, values)

    with (
        mock.patch.object(Autotuner, "run", tuned),
        mock.patch.object(JITFunction, "run", plain),
        set_wrap_triton_enabled(False),
        dispatch.assuming(capability),
    ):
        yield found


def compile_launch(recorded: Launch, target: str, config: triton.Config) -> Any:
    """The kernel as this launch would compile it for ``target``."""
    return compile_kernel(recorded.kernel, target, config, **recorded.arguments, **recorded.constants)


@dataclass(frozen=True)
class LayerTensors:
    """Arguments of a layer on ``meta``: channels_last activations, weights as the module stores them."""

    x: Tensor
    grad: Tensor
    weight_gwc: Tensor
    weight_pwc: Tensor
    weight_redundant: Tensor | None
    bias: Tensor
    branch_bias: Tensor
    geometry: Geometry


def layer_tensors(case: Case, dtype: torch.dtype) -> LayerTensors:
    """The arguments of ``case``."""

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta", memory_format=torch.channels_last)

    redundant = case.in_channels - case.representative
    return LayerTensors(
        empty(case.batch, case.in_channels, *case.size),
        empty(case.batch, case.out_channels, *case.output_size()),
        empty(case.out_channels, case.representative // case.groups, *case.kernel_size),
        empty(case.out_channels, case.representative, 1, 1),
        empty(case.out_channels, redundant, 1, 1) if redundant else None,
        torch.empty(case.out_channels, dtype=dtype, device="meta"),
        torch.empty(2, case.out_channels, dtype=dtype, device="meta"),
        Geometry(case.kernel_size, case.stride, case.padding, case.dilation, case.groups),
    )


def forward_launches(
    case: Case,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    *,
    bias: bool = False,
    branch_bias: bool = False,
    residual: bool = False,
    **epilogue: Any,
) -> list[Launch]:
    """Of one inference of the gated layer, or of U3 alone where ``case.alpha`` is 1."""
    t = layer_tensors(case, dtype)
    with recording(capability) as found:
        if t.weight_redundant is None:
            launch.representative_branch(t.x, t.weight_gwc, t.weight_pwc, t.geometry)
        else:
            weights = (t.weight_gwc, t.weight_pwc, t.weight_redundant)
            biases = t.bias if bias else None, t.branch_bias if branch_bias else None
            added = t.grad if residual else None
            launch.spconv2d(t.x, *weights, *biases, t.geometry, residual=added, **epilogue)
    return found


def backward_launches(
    case: Case,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    *,
    branch_bias: bool = False,
    path: str = "auto",
) -> list[Launch]:
    """Of the gradients of everything, likewise."""
    t = layer_tensors(case, dtype)
    with recording(capability) as found:
        if t.weight_redundant is None:
            launch.representative_branch_backward(t.grad, t.x, t.weight_gwc, t.weight_pwc, t.geometry)
        else:
            weights = (t.weight_gwc, t.weight_pwc, t.weight_redundant)
            batch, outputs, representative = case.batch, case.out_channels, case.representative
            ratio = t.x.new_empty((batch, outputs), dtype=torch.float32)
            tap_mean = t.x.new_empty((batch, t.geometry.taps, representative))
            pool_mean = t.x.new_empty((batch, case.in_channels))
            biases = t.branch_bias if branch_bias else None
            launch.spconv2d_backward(t.grad, t.x, *weights, biases, ratio, tap_mean, pool_mean, t.geometry, path=path)
    return found


def fusion_launches(case: Case, dtype: torch.dtype) -> list[Launch]:
    """Of the GAP / softmax fusion of two branches in memory, forward and backward."""
    t = layer_tensors(case, dtype)
    gate = t.x.new_empty((case.batch, case.out_channels), dtype=torch.float32)
    with recording(None) as found:
        launch.gap_softmax_fusion(t.grad, t.grad)
        launch.gap_softmax_fusion_backward(t.grad, t.grad, t.grad, gate)
    return found


def batch_norm_launches(case: Case, dtype: torch.dtype, capability: tuple[int, int] | None) -> list[Launch]:
    """Of the layer with batch norms in its branches, in training: forward and gradients."""
    t = layer_tensors(case, dtype)
    assert t.weight_redundant is not None
    weights = (t.weight_gwc, t.weight_pwc, t.weight_redundant)
    norms = launch.Norms(*(torch.empty(case.out_channels, device="meta") for _ in range(4)))
    with recording(capability) as found:
        _, kept = launch.spconv2d_batch_norm(t.x, *weights, t.bias, norms, (1e-5, 1e-5), t.geometry)
        launch.spconv2d_batch_norm_backward(t.grad, t.x, *weights, norms, kept, t.geometry)
    return found
