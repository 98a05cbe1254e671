"""Which layers' kernels begin while the one ahead still runs, and that a graph's do not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import Case
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch.utils._python_dispatch import TorchDispatchMode

from spconv_triton.dispatch import HAS_TRITON, INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs compiled kernels: runs natively", allow_module_level=True)

from lowering import inductor_sources

from benchmarks.host import idle_gpu
from benchmarks.launches import compile_launch, forward_launches
from spconv_triton import SPConv2d, launch
from spconv_triton.geometry import resolve
from spconv_triton.launch.common import FEW

HOPPER = (9, 0)


def overlapping(case: Case, capability: tuple[int, int] | None) -> list[str]:
    launches = forward_launches(case, torch.float16, capability)
    return [recorded.name for recorded in launches if recorded.constants.get("OVERLAP")]


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
    for recorded in forward_launches(Case("descriptor", 1, 64, 64, (8, 8)), torch.float16, HOPPER):
        ptx = compile_launch(recorded, "sm_90", recorded.configs[0]).asm["ptx"]
        wait = ptx.index("griddepcontrol.wait")
        accesses = [found.start() for found in re.finditer(r"\b(?:ld|st)\.global|\bcp\.async\.c", ptx)]
        assert min(accesses) > wait, recorded.name
        lets_begin = ptx.find("griddepcontrol.launch_dependents")
        assert lets_begin == -1 if recorded.name == "onepass_descriptor" else lets_begin > wait, recorded.name


class Copies(TorchDispatchMode):
    """Notes every operation of ATen that writes what is new."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
            self.found.append("copy")
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def order() -> Iterator[list[str]]:
    """The launches of a Hopper that is not there, in order: copies, and kernels by name, "early" before those that may
    begin while the one ahead of them runs."""
    found: list[str] = []
    with idle_gpu(lambda kernel, grid, arguments: found.append(f"{'early ' * kernel[2]}{kernel[0]}")), Copies(found):
        yield found


def pixels(*size: int) -> Tensor:
    return torch.randn(size).half().permute(0, 3, 1, 2)


VIEWS: dict[str, Callable[[], Tensor]] = {
    "dense": lambda: pixels(1, 8, 8, 64),
    "channels": lambda: pixels(1, 8, 8, 128)[:, 64:],
    "off-16-bytes": lambda: pixels(1, 8, 8, 72)[:, 3:67],
    "expanded": lambda: torch.randn(1, 64, 1, 1).half().expand(1, 64, 8, 8),
    "expanded-rows": lambda: pixels(1, 1, 8, 64).expand(1, 64, 8, 8),
    "contiguous": lambda: torch.randn(1, 64, 8, 8).half(),
}
EARLY = ["early window_statistics", "early gate_planes", "early onepass_descriptor"]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("view", VIEWS)
def test_no_convolution_begins_while_its_x_is_copied(view: str, stride: int, order: list[str]) -> None:
    """It reads x before it waits, so x has to be there when the kernel ahead of it begins."""
    gwc, pwc, redundant = torch.randn(64, 16, 3, 3).half(), torch.randn(64, 32, 1, 1).half(), torch.randn(64, 32, 1, 1)
    weights = gwc.contiguous(memory_format=torch.channels_last), pwc, redundant.half()
    x = VIEWS[view]()
    order.clear()
    with torch.no_grad(), set_wrap_triton_enabled(False):
        launch.spconv2d(x, *weights, None, None, resolve(3, stride, 1, 1, 2))
    copies = [place for place, what in enumerate(order) if what == "copy"]
    kernels = [what for what in order if what != "copy"]
    assert kernels[:2] == EARLY[:2]
    copied_late = any(place > order.index(EARLY[1]) for place in copies)
    assert kernels[2:] == ["onepass_descriptor" if copied_late else EARLY[2]]
    assert bool(copies) == (view not in ("dense", "channels") or (view, stride) == ("channels", 2))


def test_nor_one_that_is_called_alone(order: list[str]) -> None:
    """Nobody knows what is ahead of the operator: in a graph, and where others call it, it may be what writes x."""
    packed, planes = torch.randn(64, 32 + 9 * 32).half(), torch.rand(3, 1, 64)
    for view in ("dense", "off-16-bytes"):
        arguments = (VIEWS[view](), packed, *planes, None, 32, 1, 1, "none")
        torch.ops.spconv_triton.onepass_descriptor(*arguments)
    assert [what for what in order if what != "copy"] == ["onepass_descriptor"] * 2


def test_a_graph_s_kernels_do_not() -> None:
    """PyTorch takes one that waits to write all that it is given, and would copy that before."""
    layer = SPConv2d(64, 64, 3, padding=1, bias=False, backend="triton").half().to(memory_format=torch.channels_last)
    x = torch.randn(1, 64, 8, 8).half().contiguous(memory_format=torch.channels_last).requires_grad_()
    forward, _ = inductor_sources(layer, x, capability=HOPPER)
    assert set(re.findall(r"'OVERLAP': (\w+)", forward)) == {"False"}
