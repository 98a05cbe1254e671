"""The backward's descriptor kernels and reductions, compiled for Hopper and Blackwell as ResNet-50 gets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import triton

from spconv_triton.dispatch import HAS_TRITON, INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs compiled kernels: runs natively", allow_module_level=True)

from cases import RESNET50, Case

from benchmarks.machine_code import compile_kernel, count, read
from spconv_triton.geometry import Geometry
from spconv_triton.launch import gradients
from spconv_triton.launch import gradients_descriptor as descriptor
from spconv_triton.launch.gradients_descriptor import InputTile

BATCHES = (1, 8, 32, 128, 256)

SHARED_BYTES = 227 * 1024

# Instructions of a K step on sm_90 as the sketches of these kernels have them for 512 channels; the design notes count
# issue slots, warps / 4 times as many.
SKETCH = {"dgrad": 252, "dgradT": 273, "wgrad": 138}


def plan_of(case: Case) -> descriptor.Packing:
    plan = descriptor.packing(case.in_channels, case.representative, case.out_channels, case.groups)
    assert plan is not None
    return plan


def tile_of(case: Case, batch: int) -> InputTile:
    return descriptor.input_tile(plan_of(case), (batch, case.in_channels, *case.size), case.representative, case.groups)


def arguments(case: Case, dtype: torch.dtype) -> tuple[Any, ...]:
    """g, x, the weights and gamma / beta, on no device."""
    batch, channels, outputs = 8, case.in_channels, case.out_channels
    like = {"dtype": dtype, "device": "meta"}
    g, x = (torch.empty(batch, *case.size, c, **like).permute(0, 3, 1, 2) for c in (outputs, channels))
    aL = case.representative
    weights = [torch.empty(outputs, c, k, k, **like) for c, k in ((aL // case.groups, 3), (aL, 1), (channels - aL, 1))]
    return g, x, *weights, torch.empty(batch, outputs, device="meta")


def launched(module: Any, name: str, launch: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``launch`` passes to the kernel of this name."""
    calls: list[tuple[Any, ...]] = []
    kernel = mock.MagicMock()
    kernel.__getitem__.return_value = lambda *args, **constants: calls.append((args, constants))
    with mock.patch.object(module, name, kernel), mock.patch.object(gradients, "wrap_triton", lambda k: k):
        launch()
    return calls[0]


def compiled(module: Any, name: str, target: str, launch: Callable[[], Any]) -> Any:
    """The kernel of this name as ``launch`` would compile it."""
    args, constants = launched(module, name, launch)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    return compile_kernel(getattr(module, name), target, triton.Config({}, **options), *args, **constants)


def input_kernel(case: Case, tile: InputTile, target: str, dtype: torch.dtype) -> Any:
    g, x, *_, ratio = arguments(case, dtype)
    batch, channels = x.shape[:2]
    packed = x.new_empty((plan_of(case).rows, channels))
    gate, constant = ratio.new_empty((2, *ratio.shape)), ratio.new_empty((9, batch, channels))
    with mock.patch.object(descriptor, "input_tile", lambda *_: tile):
        return compiled(
            descriptor,
            "input_grad_descriptor",
            target,
            lambda: descriptor.input_grad.body(g, packed, gate, constant, case.representative, case.groups),
        )


def weight_kernel(case: Case, target: str, dtype: torch.dtype) -> Any:
    capability = (int(target[3:]) // 10, 0)
    with mock.patch.object(descriptor, "capability", lambda device: capability):
        return compiled(
            descriptor,
            "weight_grad_descriptor",
            target,
            lambda: descriptor.weight_grad.body(*arguments(case, dtype), case.groups),
        )


def check(kernel: Any, target: str, loads: int) -> None:
    used = read(kernel)
    loop = used.loop
    assert used.spilled_bytes == 0, f"{used.spilled_bytes} bytes spilled a thread"
    assert count(used.instructions, "LDL", "STL") == 0, "local memory"
    assert used.shared_bytes <= SHARED_BYTES
    assert count(loop, "HGMMA" if target == "sm_90" else "UTCHMMA") > 0
    assert count(loop, "UTMALDG") == loads
    assert count(loop, "LDG", "LDGSTS") == 0, "pointers in the loop"
    assert used.count("UTMALDG") >= 2 * loads, "nothing is loaded ahead"


def input_variants() -> list[Any]:
    """Every tile of every layer in float16; the tile at batch 128 in bfloat16."""
    found = []
    for case in RESNET50:
        for tile in sorted({tile_of(case, batch) for batch in BATCHES}):
            found += [(target, torch.float16, case, tile) for target in ("sm_90", "sm_100")]
        found += [(target, torch.bfloat16, case, tile_of(case, 128)) for target in ("sm_90", "sm_100")]
    return [pytest.param(*v, id=f"{v[0]}-{v[1]}-{v[2]}-{'x'.join(map(str, v[3][1:5]))}") for v in found]


@pytest.mark.parametrize(("target", "dtype", "case", "tile"), input_variants())
def test_input_gradient(target: str, dtype: torch.dtype, case: Case, tile: InputTile) -> None:
    loads = 4 if plan_of(case).mixed and tile.transposed else 3  # g, weights, beta or gamma, or both
    check(input_kernel(case, tile, target, dtype), target, loads)


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_weight_gradient(case: Case, dtype: torch.dtype, target: str) -> None:
    check(weight_kernel(case, target, dtype), target, 2)


def test_steps_are_as_short_as_the_sketches() -> None:
    case = RESNET50[3]
    shared = InputTile(False, 1, 8, 16, 128, 64, 8, 3)
    assert len(read(input_kernel(case, shared, "sm_90", torch.float16)).loop) <= 1.05 * SKETCH["dgrad"]
    transposed = InputTile(True, 1, 16, 16, 128, 64, 8, 3)
    assert len(read(input_kernel(case, transposed, "sm_90", torch.float16)).loop) <= 1.05 * SKETCH["dgradT"]
    assert len(read(weight_kernel(case, "sm_90", torch.float16)).loop) <= 1.05 * SKETCH["wgrad"]


@pytest.mark.parametrize(
    ("target", "prepare"),
    [("sm_80", False), ("gfx942", False), ("sm_90", False), ("sm_90", True), ("sm_100", True)],
)
def test_reductions(target: str, prepare: bool) -> None:
    case = RESNET50[2]
    g, x, *weights, ratio = arguments(case, torch.bfloat16)
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), case.groups)
    parts, bias = ratio.new_empty((12, 8, 1, case.out_channels)), x.new_empty((2, case.out_channels))
    means = x.new_empty((8, 9, case.representative)), x.new_empty((8, case.in_channels))
    partial = ratio.new_empty((3, sum(w.numel() for w in weights)))
    gate = gradients.GateGrad(ratio, ratio.new_empty((2, *ratio.shape)), bias, *means, 196)
    prepared = descriptor.prepare(x, weights[1], case.groups) if prepare else None
    for name, launch in (
        ("gate_grad", lambda: gradients.gate_gradient(g, parts, 4, ratio, bias, *means, prepared)),
        ("finish_weights", lambda: gradients.finish_weight_grads(partial, weights, gate, geometry, prepared)),
    ):
        used = read(compiled(gradients, name, target, launch))
        assert used.spilled_bytes == 0, f"{name}: {used.spilled_bytes} bytes spilled a thread"
        assert used.shared_bytes <= 64 * 1024
