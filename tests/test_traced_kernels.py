"""What PyTorch's compiler believes a kernel writes: a kernel that it does not understand is taken to write everything,
and then it copies x and the weights before each call."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from cases import Case
from torch._higher_order_ops import triton_kernel_wrap

from benchmarks import traffic
from benchmarks.launches import Launch, backward_launches, batch_norm_launches, forward_launches, fusion_launches
from benchmarks.machine_code import compiling_for
from spconv_triton.launch.launching import traced

CASES = (
    Case("wide", 2, 64, 64, (6, 4)),
    Case("stride-2", 2, 12, 20, (8, 6), stride=(2, 2), alpha=2 / 3),
    Case("stride-3-one-column", 1, 4, 4, (7, 1), stride=(3, 1)),
    Case("k5", 1, 4, 4, (6, 7), kernel_size=(5, 5), padding=(2, 2)),
)


def believed(launch: Launch) -> set[str]:
    """Arguments that tracing says a launch writes."""
    table = triton_kernel_wrap.kernel_side_table
    kernel = table.add_kernel(launch.kernel)
    constants = table.add_constant_args({**traced(launch.constants), **launch.configs[0].kwargs})
    return set(triton_kernel_wrap.get_mutated_tensors(kernel, constants, launch.arguments, {}))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_believed_to_write_what_they_write(case: Case) -> None:
    window = (case, torch.float16, (9, 0))
    launches = [*forward_launches(*window, path="flat", bias=True), *backward_launches(*window, path="flat")]
    # Kernels over descriptors are operators, in which a graph sees nothing; those before and between them it sees.
    over_descriptors = [*forward_launches(*window), *backward_launches(*window)] if case.name == "wide" else []
    launches += [launch for launch in over_descriptors if not launch.name.endswith("_descriptor")]
    launches += [*batch_norm_launches(*window), *fusion_launches(case, torch.float16)]
    assert len({launch.name for launch in launches}) > 12
    with compiling_for("sm_90"):
        for launch in launches:
            written = traffic.of_launch(launch, launch.configs[0]).stores
            assert believed(launch) == set(written), launch.name
