"""Which layers' kernels begin while the one ahead still runs, and that a graph's do not."""

from __future__ import annotations

import re

import pytest
import torch
from cases import Case

from spconv_triton.dispatch import HAS_TRITON, INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs compiled kernels: runs natively", allow_module_level=True)

from lowering import inductor_sources

from benchmarks.host import idle_gpu
from benchmarks.launches import compile_launch, forward_launches
from spconv_triton import SPConv2d
from spconv_triton.launch.common import FEW

HOPPER = (9, 0)


def overlapping(case: Case, capability: tuple[int, int] | None) -> list[str]:
    launches = forward_launches(case, torch.float16, capability)
    return [launch.name for launch in launches if launch.constants.get("OVERLAP")]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch", [1, FEW, FEW + 1])
def test_few_samples_do(batch: int, stride: int) -> None:
    found = overlapping(Case("descriptor", batch, 64, 64, (8, 8), stride=(stride, stride)), HOPPER)
    assert found == (["window_statistics", "gate_planes", "onepass_descriptor"] if batch <= FEW else [])


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), False), (HOPPER, True), ((12, 0), True), (None, False)])
def test_from_compute_capability_9_on(capability: tuple[int, int] | None, expected: bool) -> None:
    found = overlapping(Case("flat", 1, 20, 20, (5, 5)), capability)
    assert found == (["window_statistics", "gate_planes"] if expected else [])


@pytest.mark.parametrize("batch", [FEW, FEW + 1])
def test_they_are_launched_so(batch: int) -> None:
    """What Triton's launcher is given says so, at first and again."""
    launched: list[bool] = []
    layer = SPConv2d(64, 64, 3, padding=1, dtype=torch.float16, backend="triton").requires_grad_(False)
    x = torch.randn(batch, 64, 8, 8).half().contiguous(memory_format=torch.channels_last)
    with idle_gpu(lambda kernel, grid, arguments: launched.append(kernel[-1])):
        layer(x)
        layer(x)
    assert launched == [batch <= FEW] * 6


def test_they_wait_before_they_read_what_the_one_ahead_writes() -> None:
    """Statistics and gate before they read or write anything, the convolution before it reads the gate; and it alone
    lets nothing begin: what follows may be any kernel."""
    for launch in forward_launches(Case("descriptor", 1, 64, 64, (8, 8)), torch.float16, HOPPER):
        ptx = compile_launch(launch, "sm_90", launch.configs[0]).asm["ptx"]
        wait = ptx.index("griddepcontrol.wait")
        accesses = [found.start() for found in re.finditer(r"\b(?:ld|st)\.global|\bcp\.async\.c", ptx)]
        assert min(accesses) > wait, launch.name
        lets_begin = ptx.find("griddepcontrol.launch_dependents")
        assert lets_begin == -1 if launch.name == "onepass_descriptor" else lets_begin > wait, launch.name


def test_a_graph_s_kernels_do_not() -> None:
    """PyTorch takes one that waits to write all that it is given, and would copy that before."""
    layer = SPConv2d(64, 64, 3, padding=1, bias=False, backend="triton").half().to(memory_format=torch.channels_last)
    x = torch.randn(1, 64, 8, 8).half().contiguous(memory_format=torch.channels_last).requires_grad_()
    forward, _ = inductor_sources(layer, x, capability=HOPPER)
    assert set(re.findall(r"'OVERLAP': (\w+)", forward)) == {"False"}
