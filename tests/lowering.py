"""What Inductor would send to a GPU, on a machine without one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch._higher_order_ops import triton_kernel_wrap

from benchmarks.machine_code import compiling_for
from spconv_triton import dispatch
from spconv_triton.launch import common

ACCESSES = "identify_accessed_tensors"
if not hasattr(triton_kernel_wrap, ACCESSES):
    ACCESSES = "identify_mutated_tensors"  # its name in PyTorch 2.11


class Lowered(Exception):  # noqa: N818
    """Raised instead of running the generated code: everything wanted is in its source by then."""


@dataclass(frozen=True)
class Call:
    """One of our kernels or operators, as the generated code calls it.

    Attributes:
        name: without the number that makes a kernel's name unique.
        grid: as an expression, one for each configuration where they differ; empty for an operator.
    """

    name: str
    grid: str

    @property
    def symbolic(self) -> bool:
        """Whether the grid depends on a size that is not known yet."""
        return re.search(r"\b(_launcher_)?s\d+\b", self.grid) is not None


def calls(source: str) -> list[Call]:
    """What the generated code launches of ours, in order: Triton kernels, and operators that it does not see into."""
    defined = r"^(\w+) = async_compile\.triton\(.*?inductor_meta=({.*?)\n"
    tables = {
        name: ", ".join(re.findall(r"'python': (\[.*?\])", meta))
        for name, meta in re.findall(defined, source, re.M | re.S)
    }
    found = []
    for name, arguments, operator in re.findall(
        r"^\s+(?:(\w+)\.run\((.*), stream=.*|.*torch\.ops\.spconv_triton\.(\w+)\.default\(.*)$", source, re.M
    ):
        # The grid is known when the kernel is compiled, or the last three arguments of its launch.
        grid = tables.get(name) or ", ".join(re.split(r", (?![^(]*\))", arguments)[-3:])
        found.append(Call(operator or re.sub(r"_\d+$", "", name), "" if operator else grid))
    return found


def inductor_sources(
    function: Callable[..., Any],
    *args: Any,
    target: str = "sm_90",
    dynamic: bool | None = False,
    capability: tuple[int, int] | None = None,
) -> list[str]:
    """The wrapper code that Inductor generates for ``target``: the forward, then the backward if one is needed.

    Tensors stay on the CPU, so what is not a kernel of ours is generated as C++; our kernels are launched from it as
    they would be on the device. Of one graph: a break is an error.

    Args:
        dynamic: as of ``torch.compile``; None leaves it to ``torch._dynamo.mark_dynamic``.
        capability: what the device is taken to have when a layer chooses its kernels; None takes the flat ones.
    """
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config
    from torch._dynamo import device_interface
    from torch._inductor import cpu_vec_isa
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties

    sources: list[str] = []

    def keep_source(graph: GraphLowering) -> Any:
        sources.append(graph.codegen()[0].value)
        module = mock.Mock()
        module.call = mock.Mock(side_effect=Lowered)
        return module

    accesses = Remembered(getattr(triton_kernel_wrap, ACCESSES))
    with (
        compiling_for(target),
        mock.patch.object(dispatch, "_why_not_triton", lambda x: None),
        mock.patch.object(common, "capability", lambda device: capability),
        mock.patch.object(GraphLowering, "compile_to_module", keep_source),
        mock.patch.object(
            device_interface.CpuInterface, "raise_if_triton_unavailable", staticmethod(lambda *a, **k: None)
        ),
        # Of no interest here, and most of the time: which vector instructions a C++ compiler takes, and for every
        # launch anew what its kernel writes.
        mock.patch.object(cpu_vec_isa, "valid_vec_isa_list", list),
        mock.patch.object(triton_kernel_wrap, ACCESSES, accesses),
        functorch_config.patch(force_non_lazy_backward_lowering=True),
        inductor_config.patch(force_disable_caches=True),
    ):
        gpu = triton.runtime.driver.active.get_current_target()
        properties = DeviceProperties(
            type=gpu.backend, index=0, multi_processor_count=132, cc=gpu.arch, warp_size=gpu.warp_size
        )
        with mock.patch.object(DeviceProperties, "create", classmethod(lambda cls, device: properties)):
            torch._dynamo.reset()
            try:
                torch.compile(function, fullgraph=True, dynamic=dynamic)(*args)
            except Lowered:
                return sources
    raise AssertionError("nothing was lowered: the compiled function ran")


class Remembered:
    """PyTorch's analysis of what a Triton kernel reads and writes, once for each kernel and kind of arguments."""

    def __init__(self, analyse: Callable[..., Any]) -> None:
        self.analyse = analyse
        self.found: dict[Any, Any] = {}

    def __call__(self, kernel: Any, arguments: dict[str, Any], descriptors: dict[str, Any]) -> Any:
        assert not descriptors, "none of our kernels is given a descriptor where PyTorch sees it"
        blocks = str(kernel.configs[0]) if hasattr(kernel, "configs") else ""
        function = kernel
        while hasattr(function, "fn"):  # Inductor makes kernels of its own, of the same Python function
            function = function.fn
        key = function, blocks, tuple((name, _kind(value)) for name, value in arguments.items())
        if key not in self.found:
            self.found[key] = self.analyse(kernel, arguments, descriptors)
        return self.found[key]


def _kind(value: Any) -> Any:
    """All that the analysis looks at: it takes 2 for a size that is a symbol."""
    if hasattr(value, "dtype"):
        return value.dtype
    return value if isinstance(value, (int, float, str)) else type(value)
