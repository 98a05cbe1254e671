"""What Inductor would send to a GPU, on a machine without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import triton

from benchmarks.machine_code import compiling_for
from spconv_triton import dispatch


class Lowered(Exception):  # noqa: N818
    """Raised instead of running the generated code: everything wanted is in its source by then."""


def inductor_sources(
    function: Callable[..., Any], *args: Any, target: str = "sm_90", dynamic: bool = False
) -> list[str]:
    """The wrapper code that Inductor generates for ``target``: the forward, then the backward if one is needed.

    Tensors stay on the CPU, so what is not a kernel of ours is generated as C++; our kernels are launched from it as
    they would be on the device.
    """
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config
    from torch._dynamo import device_interface
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties

    sources: list[str] = []

    def keep_source(graph: GraphLowering) -> Any:
        sources.append(graph.codegen()[0].value)
        module = mock.Mock()
        module.call = mock.Mock(side_effect=Lowered)
        return module

    with (
        compiling_for(target),
        mock.patch.object(dispatch, "_why_not_triton", lambda x: None),
        mock.patch.object(GraphLowering, "compile_to_module", keep_source),
        mock.patch.object(
            device_interface.CpuInterface, "raise_if_triton_unavailable", staticmethod(lambda *a, **k: None)
        ),
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
