"""The descriptor kernel, compiled for Hopper and Blackwell in every tile that ResNet-50's layers get."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import triton

from spconv_triton.dispatch import HAS_TRITON, INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs compiled kernels: runs natively", allow_module_level=True)

from cases import RESNET50, Case

from benchmarks.machine_code import MachineCode, compile_kernel, count, read
from spconv_triton.launch import descriptor
from spconv_triton.launch.descriptor import Tile

BATCHES = (1, 8, 32, 128, 256)

SHARED_BYTES = 227 * 1024

# Instructions of a K step on sm_90 as the sketch of this kernel has them, compiled by Triton 3.8; a step that loads and
# multiplies this little is bound by them where they are more than the tensor cores' cycles.
SKETCH = {
    "resnet50-64@56": ((4, 8, 8), 94),
    "resnet50-128@28": ((16, 4, 4), 94),
    "resnet50-256@14": ((32, 2, 2), 107),
    "resnet50-512@7": ((64, 1, 1), 157),
}


def tile_of(case: Case, batch: int, stride: int = 1) -> Tile:
    plan = descriptor.packing(case.in_channels, case.representative, case.out_channels, case.groups)
    assert plan is not None
    height, width = (side // stride for side in case.size)
    return descriptor.best_tile(plan, case.groups, stride, (batch, height, width, case.out_channels))


def compiled(case: Case, tile: Tile | None, target: str, dtype: torch.dtype, stride: int = 1, **epilogue: Any) -> Any:
    """The kernel as the launch would compile it; the row kernel where there is no tile."""
    launched: list[tuple[Any, ...]] = []
    height, width = case.size
    x = torch.empty(8, height, width, case.in_channels, dtype=dtype, device="meta").permute(0, 3, 1, 2)
    plane = torch.empty(8, case.out_channels, device="meta")
    plan = descriptor.packing(case.in_channels, case.representative, case.out_channels, case.groups)
    packed = x.new_empty((case.out_channels, plan.columns))
    recorder = mock.MagicMock()
    recorder.__getitem__.return_value = lambda *args, **constants: launched.append((args, constants))
    kernel = descriptor.kernel if tile else descriptor.onepass_rows
    residual = (
        x.new_empty((8, case.out_channels, height // stride, width // stride)) if epilogue.get("residual") else None
    )
    window = (case.representative, case.groups, stride, epilogue.get("activation", "none"))
    with (
        mock.patch.multiple(descriptor, kernel=recorder, onepass_rows=recorder),
        mock.patch.object(descriptor, "best_tile", lambda *_: tile),
        mock.patch.object(descriptor, "streamed_rows", lambda *_: None if tile else 28),
    ):
        descriptor.convolve.body(x, packed, plane, plane, plane, residual, *window)
    args, constants = launched[0]
    config = triton.Config({}, num_warps=constants.pop("num_warps"), num_stages=constants.pop("num_stages"))
    return compile_kernel(kernel, target, config, *args, **constants)


def check(kernel: Any, target: str) -> None:
    used = read(kernel)
    loop = used.loop
    assert used.spilled_bytes == 0, f"{used.spilled_bytes} bytes spilled a thread"
    assert count(used.instructions, "LDL", "STL") == 0, "local memory"
    assert used.shared_bytes <= SHARED_BYTES
    assert count(loop, "HGMMA" if target == "sm_90" else "UTCHMMA") > 0
    assert count(loop, "UTMALDG") == 2, "x and weights, one box each"
    assert count(loop, "LDG", "LDGSTS") == 0, "pointers in the loop"


def variants() -> list[Any]:
    """Every tile of every layer in float16 on sm_90; elsewhere the tile at batch 128."""
    found = []
    for case in RESNET50:
        picks = sorted({tile_of(case, batch) for batch in BATCHES})
        found += [("sm_90", torch.float16, case, tile) for tile in picks]
        found += [("sm_100", torch.float16, case, tile) for tile in picks]
        found += [
            ("sm_90", torch.bfloat16, case, tile_of(case, 128)),
            ("sm_100", torch.bfloat16, case, tile_of(case, 128)),
        ]
    return [pytest.param(*v, id=f"{v[0]}-{v[1]}-{v[2]}-{'x'.join(map(str, v[3][:4]))}") for v in found]


@pytest.mark.parametrize(("target", "dtype", "case", "tile"), variants())
def test_every_tile_of_resnet50(target: str, dtype: torch.dtype, case: Case, tile: Tile) -> None:
    check(compiled(case, tile, target, dtype), target)


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_tf32(case: Case, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptor, "dot_precision", lambda dtype: "tf32")
    check(compiled(case, tile_of(case, 128), target, torch.float32), target)


@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_residual_and_relu(case: Case) -> None:
    check(compiled(case, tile_of(case, 128), "sm_90", torch.float16, residual=True, activation="relu"), "sm_90")


@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_stride_2(case: Case) -> None:
    check(compiled(case, tile_of(case, 128, 2), "sm_90", torch.float16, 2), "sm_90")


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", descriptor.DTYPES, ids=str)
def test_rows(dtype: torch.dtype, target: str) -> None:
    kernel = compiled(RESNET50[0], None, target, dtype)
    used = read(kernel)
    assert used.spilled_bytes == 0, f"{used.spilled_bytes} bytes spilled a thread"
    assert used.count("HGMMA" if target == "sm_90" else "UTCHMMA") == 20, "ten products of 32 channels"
    assert count(used.loop, "UTMALDG") == 4, "a row three times, and the redundant channels once"
    assert programs_a_processor(used, 4) >= 2


def programs_a_processor(used: MachineCode, warps: int) -> int:
    """How many share a processor of 64 Ki registers."""
    return min(65536 // (used.registers * 32 * warps), SHARED_BYTES // used.shared_bytes)


@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_steps_are_as_short_as_the_sketch_s(case: Case) -> None:
    box, instructions = SKETCH[case.name]
    tile = tile_of(case, 128)
    assert tile[:3] == box
    kernel = compiled(case, tile, "sm_90", torch.float16)
    assert len(read(kernel).loop) <= 1.05 * instructions
    assert programs_a_processor(read(kernel), tile.num_warps) >= 2
