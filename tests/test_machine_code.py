"""The gate: every kernel of the matrix compiles for every GPU, spills nothing, and fits its shared memory.

Nothing of the matrix is compiled here but a sample: ``benchmarks/results/static.json``, committed with each change of a
kernel, holds what came out, by a fingerprint of what decides it. The sample shows that the file tells the truth.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from spconv_triton.dispatch import HAS_TRITON, INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs compiled kernels: runs natively", allow_module_level=True)

from cases import RESNET50, Case

from benchmarks import matrix, static
from benchmarks.launches import Launch, backward_launches, batch_norm_launches
from benchmarks.machine_code import compiling_for, count
from benchmarks.machine_code_gate import EXEMPT, SPILLS_NOTHING, Exempt, complaints, unused
from benchmarks.matrix import Compilation
from benchmarks.measurements import Row, load, measure
from spconv_triton import launch
from spconv_triton.kernels.backward import weight_grad
from spconv_triton.kernels.tuning import weight_grad_channels
from spconv_triton.launch import descriptor, gradients_descriptor
from spconv_triton.launch.gradients_descriptor import InputTile

SAMPLE = 3
"""Rows of the file that each run compiles again."""

REPAIR = "run `python -m benchmarks.static` (make static) and commit benchmarks/results/"


@pytest.fixture(scope="module")
def wanted() -> list[Compilation]:
    return list(matrix.compilations())


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    """The committed report, by fingerprint."""
    return {row.fingerprint: row for row in load(static.REPORT)}


def assert_complete(wanted: Sequence[Compilation], rows: dict[str, Row]) -> None:
    """Every kernel of the matrix has its row, as it is now, and no row is anything else's."""
    missing = [one for one in wanted if one.fingerprint not in rows]
    examples = "\n".join(str(Row(*one.identity, one.fingerprint, one.warps)) for one in missing[:5])
    assert not missing, (
        f"{len(missing)} of {len(wanted)} kernels have changed since they were compiled: {REPAIR}\n{examples}"
    )
    extra = rows.keys() - {one.fingerprint for one in wanted}
    assert not extra, f"{len(extra)} rows, such as {rows[min(extra)]}, are no kernel's any more: {REPAIR}"
    misnamed = [one for one in wanted if rows[one.fingerprint].identity != one.identity]
    assert not misnamed, f"{len(misnamed)} rows have an old name: {REPAIR}"


def assert_true(one: Compilation, rows: dict[str, Row]) -> None:
    """The file holds what the compiler says."""
    assert measure(one) == rows[one.fingerprint], f"benchmarks/results/static.json is wrong: {REPAIR}"


def test_every_kernel_is_in_the_report(wanted: list[Compilation], rows: dict[str, Row]) -> None:
    version = json.loads(static.REPORT.read_text())["triton"]
    assert version == triton.__version__, f"the report is of Triton {version}, as constraints.txt pins it"
    assert_complete(wanted, rows)


def test_nothing_spills_or_overflows(rows: dict[str, Row]) -> None:
    wrong = complaints(rows.values())
    assert not wrong, "\n".join(wrong)
    assert not unused(list(rows.values())), "exceptions that nothing needs"
    for target in SPILLS_NOTHING:
        assert not any(row.spilled_bytes or row.local for row in rows.values() if row.target == target), target


def test_the_report_tells_the_truth(wanted: list[Compilation], rows: dict[str, Row]) -> None:
    for index in torch.randperm(len(wanted))[:SAMPLE].tolist():
        assert_true(wanted[index], rows)


# The gate notices.


@triton.jit
def hoards(x_ptr, y_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Holds [ROWS, COLUMNS] while it sums both ways, over and over."""
    offset = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + offset)
    total = tl.sum(x, 0)
    for _ in range(4):
        x = x * total[None, :] + tl.sum(x, 1)[:, None]
        total = tl.sum(x, 0)
    tl.store(y_ptr + offset, x)


@triton.jit
def mismatched(x_ptr, y_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds what cannot be broadcast."""
    tl.store(y_ptr + tl.arange(0, ROWS), tl.load(x_ptr + tl.arange(0, COLUMNS)))


def planted(kernel: Any, target: str, rows: int, columns: int, warps: int = 1) -> Compilation:
    x = torch.empty(rows, columns, device="meta")
    sizes = {"ROWS": rows, "COLUMNS": columns}
    config = triton.Config({}, num_warps=warps, num_stages=1)
    recorded = Launch(kernel, {"x_ptr": x, "y_ptr": x}, sizes, (config,), lambda _: (1,))
    return matrix.of_launch(recorded, config, target, "float32", "planted")


@pytest.mark.parametrize(("target", "rows", "columns"), [("sm_80", 64, 128), ("sm_90", 64, 128), ("gfx942", 64, 512)])
def test_a_spill_is_noticed(target: str, rows: int, columns: int) -> None:
    """More values than the registers of one warp hold."""
    row = measure(planted(hoards, target, rows, columns))
    assert row.spilled_bytes > 0
    assert row.local >= row.looped_local > 0
    (complaint,) = complaints([row], [])
    assert complaint.startswith(f"hoards, {target}")
    assert "spills" in complaint


@pytest.mark.parametrize("settled", [False, True])
def test_an_operand_that_is_overwritten_is_noticed(settled: bool) -> None:
    """The input gradient scales an operand in registers: ``dot_computed`` is still needed there, and enough."""
    found = backward_launches(replace(RESNET50[2], batch=128), torch.float16, (9, 0))
    (recorded,) = (one for one in found if one.name == "input_grad_descriptor")
    assert recorded.constants["HOPPER"]
    recorded = replace(recorded, constants=recorded.constants | {"HOPPER": settled})
    row = measure(matrix.of_launch(recorded, recorded.configs[0], "sm_90", "float16", "planted"))
    assert (row.overwritten == 0) == settled
    assert bool(complaints([row], [])) != settled


def test_a_compile_error_is_noticed() -> None:
    row = measure(planted(mismatched, "sm_90", 16, 32))
    assert row.registers == 0
    (complaint,) = complaints([row])
    assert "does not compile: " in complaint


def test_shared_memory_is_limited_by_target() -> None:
    def taking(target: str, kib: int) -> Row:
        return Row("k", target, "float16", "layer", "", "tile", "0", warps=4, registers=64, shared_bytes=kib * 1024)

    most = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
    assert not complaints(taking(target, kib) for target, kib in most.items())
    over = complaints(taking(target, kib + 1) for target, kib in most.items())
    assert len(over) == len(most)
    assert all("shared memory" in complaint for complaint in over)


def test_exceptions_are_narrow() -> None:
    row = Row("k", "sm_90", "float32", "layer", "", "tile", "0", warps=4, registers=128, spilled_bytes=8, local=2)
    exempt = Exempt("k", ("sm_90",), ("float32",), 8, 2, 0, "a reason")
    assert not complaints([row], [exempt])
    assert not unused([row], [exempt])
    others: tuple[dict[str, Any], ...] = (
        {"target": "sm_80"},
        {"precision": "tf32"},
        {"kernel": "l"},
        {"spilled_bytes": 12},
        {"local": 3},
        {"looped_local": 1},
    )
    for change in others:
        assert complaints([row._replace(**change)], [exempt]), change
        assert unused([row._replace(**change)], [exempt]) == [exempt], change
    assert unused([row._replace(spilled_bytes=0, local=0)], [exempt]) == [exempt]
    assert all(one.reason for one in EXEMPT)


def test_a_changed_kernel_is_noticed(wanted: list[Compilation], rows: dict[str, Row]) -> None:
    """A constant that no row was compiled with stands for a changed source: both change the fingerprint."""
    one = wanted[0]
    constants = {**one.launch.constants, "C": 1023}
    changed = replace(one, launch=replace(one.launch, constants=constants))
    with pytest.raises(AssertionError, match=r"1 of \d+ kernels have changed .*benchmarks\.static"):
        assert_complete([changed, *wanted[1:]], rows)
    with pytest.raises(AssertionError, match="no kernel's any more"):
        assert_complete(wanted[1:], rows)


def test_a_wrong_row_is_noticed(wanted: list[Compilation], rows: dict[str, Row]) -> None:
    one = next(one for one in wanted if one.kernel == "fusion_blend" and one.target == "sm_90")
    row = rows[one.fingerprint]
    assert_true(one, rows)
    with pytest.raises(AssertionError, match="is wrong"):
        assert_true(one, {one.fingerprint: row._replace(registers=row.registers + 1)})


def test_what_is_pruned_would_spill() -> None:
    """The block that cost most: float32 weight gradients without tensor cores, 64 pixels a step, on sm_80."""
    with matrix.multiplying("float32") as dtype:
        found = next(one for one in backward_launches(RESNET50[3], dtype, (8, 0)) if one.name == "weight_grad")
        (pruned,) = (config for config in weight_grad.configs if config.kwargs["BLOCK_PIX"] == 64)
        assert key(pruned) not in set(map(key, found.configs))
        row = measure(matrix.of_launch(found, pruned, "sm_80", "float32", "pruned"))
    assert row.looped_local > 100, "it no longer spills: prune_weight_grad may let it in"


# The matrix leaves nothing out.


def test_batch_norms_are_compiled_as_they_are_launched() -> None:
    found = {one.name: one.constants for one in batch_norm_launches(RESNET50[3], torch.float16, (9, 0))}
    assert found["input_grad"]["HOPPER"]
    assert {c["PRECISION"] for name, c in found.items() if name == "finish_weights"} == {"tf32x3"}


def key(config: triton.Config) -> tuple[Any, ...]:
    return tuple(sorted(config.kwargs.items())), config.num_warps, config.num_stages


def choosable(kernel: Any, precision: str, target: str) -> set[Any]:
    """What pruning leaves of the kernel's table, for some layer: of any width, groups and stride."""
    dtype, setting = matrix.PRECISIONS[precision]
    tensor = torch.empty(0, dtype=dtype, device="meta")
    found = set()
    with compiling_for(target):
        for width, groups, stride in itertools.product((1, 3, 8, 16, 24, 32, 64, 100, 128, 256, 512), (1, 2), (1, 2)):
            sizes = dict.fromkeys(("C", "CR", "CO"), width * groups) | {"G": groups, "PRECISION": setting}
            sizes |= {"STRIDE_H": stride, "STRIDE_W": stride, "BLOCK_C": weight_grad_channels(width)}
            sizes |= {"TAPS": 9, "POOL_ROW": 4 if stride == 1 else 9}
            named = {name: tensor if name.endswith("_ptr") else sizes.get(name, 16) for name in kernel.arg_names}
            found |= {key(config) for config in kernel.early_config_prune(kernel.configs, named)}
    return found


@pytest.fixture(scope="module")
def recorded() -> dict[tuple[str, str, str], set[Any]]:
    """Configurations of the matrix, by kernel, target and precision, equal machine code counted each time."""
    found: dict[tuple[str, str, str], set[Any]] = {}
    for target, precision in matrix.EVERYWHERE:
        for one in matrix.recorded(target, precision):
            found.setdefault((one.kernel, target, precision), set()).add(key(one.config))
    return found


def test_every_choice_of_every_table_is_compiled(recorded: dict[tuple[str, str, str], set[Any]]) -> None:
    for kernel in launch.TUNED_KERNELS:
        everywhere = set()
        for target, precision in matrix.EVERYWHERE:
            choices = choosable(kernel, precision, target)
            everywhere |= choices
            left_out = choices - recorded[kernel.base_fn.__name__, target, precision]
            assert not left_out, f"{kernel.base_fn.__name__} on {target} in {precision}"
        assert everywhere == set(map(key, kernel.configs)), f"{kernel.base_fn.__name__}: rows that nothing ever chooses"


def test_every_kernel_is_compiled_in_every_dtype(recorded: dict[tuple[str, str, str], set[Any]]) -> None:
    """Those of descriptors only where a layer is sent to them."""
    kernels = {name for name, _, _ in recorded}
    tuned = {getattr(kernel, "base_fn", kernel).__name__ for kernel in launch.KERNELS}
    over_descriptors = {"onepass_descriptor", "input_grad_descriptor", "weight_grad_descriptor"}
    assert kernels == tuned | over_descriptors
    for name, (target, precision) in itertools.product(kernels, matrix.EVERYWHERE):
        wanted = True
        if name in over_descriptors:
            in_halves = precision in ("float16", "bfloat16")
            as_tf32 = precision == "tf32" and name == "onepass_descriptor"
            wanted = target in matrix.DESCRIPTOR_TARGETS and (in_halves or as_tf32)
        assert ((name, target, precision) in recorded) == wanted, (name, target, precision)


def compiled_outputs(channels: int, stride: int) -> list[tuple[int, int, int]]:
    """N, H_out and W_out of the matrix's layers over descriptors of so many channels."""
    precision = "tf32" if stride == 1 else "float16"  # at a stride the tiles are the same, and compiled in that alone
    return [
        (layer.case.batch, *layer.case.output_size())
        for layer in matrix.layers()
        if (layer.case.in_channels, layer.case.stride) == (channels, (stride, stride))
        and layer.case.size[0] % stride == layer.case.size[1] % stride == 0
        and ("sm_90", precision) in layer.on
    ]


def forward_tile(channels: int, stride: int, batch: int, height: int, width: int) -> Any:
    plan = descriptor.packing(channels, channels // 2, channels, 2)
    assert plan is not None
    return descriptor.best_tile(plan, 2, stride, (batch, height, width, channels))


def backward_tile(channels: int, stride: int, batch: int, height: int, width: int) -> Any:
    plan = gradients_descriptor.packing(channels, channels // 2, channels, 2)
    assert plan is not None
    return gradients_descriptor.input_tile(plan, (batch, channels, height, width), channels // 2, 2, stride)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [64, 512])
def test_every_tile_is_compiled(channels: int, stride: int) -> None:
    """Each that some size leads to is in the matrix."""
    sizes = [(n, h, w) for n in (1, 3, 8, 64, 300) for h in (*range(1, 17), 28, 56, 65, 130) for w in (h, 2 * h, 8, 64)]
    compiled = compiled_outputs(channels, stride)
    for tile in (forward_tile, backward_tile):
        assert {tile(channels, stride, *size) for size in sizes} <= {tile(channels, stride, *size) for size in compiled}


@pytest.mark.parametrize("channels", [64, 512])
def test_the_forward_has_no_other_tiles(channels: int) -> None:
    plan = descriptor.packing(channels, channels // 2, channels, 2)
    assert plan is not None
    found = {forward_tile(channels, 1, *size) for size in compiled_outputs(channels, 1)}
    # Where programs are few, the smallest load further ahead, or more at a time.
    few = {tile for tile in found if tile.num_stages == 6 or tile.block_k == 128}
    ordinary = {tile._replace(num_stages=4, block_k=min(64, tile.block_k)) for tile in few}
    assert set(descriptor.tiles(plan, channels, 2)) == found - few | ordinary


# What the kernels over descriptors are made for.

# Instructions of a K step on sm_90 as the sketch of the forward kernel has them, compiled by Triton 3.8; a step that
# loads and multiplies this little is bound by them where they are more than the tensor cores' cycles.
FORWARD_SKETCH = {
    "resnet50-64@56": ((4, 8, 8), 94),
    "resnet50-128@28": ((16, 4, 4), 94),
    "resnet50-256@14": ((32, 2, 2), 107),
    "resnet50-512@7": ((2, 8, 8), 123),  # no sketch has this tile, which an H200 finds the fastest: what it takes now
}

# Those of the backward's, for 512 channels; the input gradient's are what they take now, likewise, with half of the
# warps of the sketches' 252 and 273.
INPUT_SKETCH = {
    InputTile(False, 4, 4, 4, 128, 64, 4, 3): 243,
    InputTile(True, 1, 8, 16, 64, 64, 4, 3): 242,
}
WEIGHT_SKETCH = 138


def of_kernel(rows: dict[str, Row], *kernels: str) -> list[Row]:
    found = [row for row in rows.values() if row.kernel in kernels]
    assert {row.kernel for row in found} == set(kernels)
    return found


def test_loops_over_descriptors_load_boxes_and_multiply(rows: dict[str, Row]) -> None:
    for row in of_kernel(rows, "onepass_descriptor", "input_grad_descriptor", "weight_grad_descriptor"):
        loads = 2  # x or g, and the weights
        if row.kernel == "input_grad_descriptor":
            loads = 4 if "MIXED TRANSPOSED" in row.flags else 3  # and beta or gamma, or both
        name = "HGMMA" if row.target == "sm_90" else "UTCHMMA"
        assert row.tensor_products, f"{row}: no product in the loop"
        assert all(product.startswith(name) for product in row.tensor_products), f"{row}: {row.loop_products}"
        # A phase of 64 channels has four steps at most, all of which four stages load before the first.
        few_steps = "MIXED" in row.flags and "stride 2" in row.layer and row.tma_loads == 4 * loads
        at_once = few_steps and row.loop_tma_loads == 0
        assert row.loop_tma_loads == loads or at_once, f"{row}: {row.loop_tma_loads} boxes a step"
        # Of few samples the gate's, in one of the steps.
        assert row.loop_pointer_loads <= ("OVERLAP" in row.flags), f"{row}: pointers in the loop"
        assert row.tma_loads >= 2 * loads, f"{row}: nothing is loaded ahead"
        assert row.tma_stores > 0 or row.kernel == "weight_grad_descriptor", f"{row}: the output is no box"


def test_flat_kernels_use_tensor_cores(rows: dict[str, Row]) -> None:
    for row in of_kernel(rows, "onepass_forward", "branch_forward", "input_grad", "weight_grad"):
        if row.precision != "float32":
            assert row.products, f"{row}: no products"
            # The narrowest layers have no loop: one step is all.
            assert row.tensor_products or not row.loop_products, f"{row}: {row.loop_products} in the loop"


def of_tile(
    rows: dict[str, Row], kernel: str, channels: int, warps: int, stages: int, flags: str, **blocks: int
) -> Row:
    """What the report has of this tile for a layer of as many channels, at stride 1, in float16 on sm_90."""
    tile = " ".join(f"{name}={size}" for name, size in sorted(blocks.items())) + f" w{warps} s{stages}"
    found = [
        row
        for row in of_kernel(rows, kernel)
        if (row.target, row.precision, row.flags, row.tile) == ("sm_90", "float16", flags, tile)
        and row.layer.startswith(f"{channels}-{channels}@")
        and "stride" not in row.layer
    ]
    assert found, f"{kernel}: no {tile}"
    return found[0]


@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_forward_steps_are_as_short_as_the_sketch_s(case: Case, rows: dict[str, Row]) -> None:
    box, instructions = FORWARD_SKETCH[case.name]
    channels = case.in_channels
    plan = descriptor.packing(channels, case.representative, channels, case.groups)
    assert plan is not None
    tile = descriptor.best_tile(plan, case.groups, 1, (128, *case.size, channels))
    assert tile[:3] == box
    n, h, w, block_co, block_k, warps, stages = tile
    row = of_tile(rows, "onepass_descriptor", channels, warps, stages, "", N=n, H=h, W=w, CO=block_co, K=block_k)
    assert row.loop <= 1.05 * instructions
    assert row.programs >= 2


def test_backward_steps_are_as_short_as_the_sketches(rows: dict[str, Row]) -> None:
    for (transposed, n, h, w, c, k, warps, stages), instructions in INPUT_SKETCH.items():
        flags = "TRANSPOSED HOPPER" if transposed else "HOPPER"
        row = of_tile(rows, "input_grad_descriptor", 512, warps, stages, flags, N=n, H=h, W=w, C=c, K=k)
        assert row.loop <= 1.05 * instructions, str(row)
    found = [
        row
        for row in of_kernel(rows, "weight_grad_descriptor")
        if (row.target, row.precision) == ("sm_90", "float16") and row.layer.startswith("resnet50-512@7")
    ]
    assert {"stride 2" in row.layer for row in found} == {False, True}
    for row in found:
        assert row.loop <= 1.05 * WEIGHT_SKETCH, str(row)
        assert row.programs == 4, str(row)


@pytest.mark.parametrize(
    ("kernel", "sides"), [("onepass_forward", "PIX CO"), ("input_grad", "PIX C"), ("branch_forward", "PIX CO")]
)
def test_without_tensor_cores_a_step_is_summed_by_itself(kernel: str, sides: str, wanted: list[Compilation]) -> None:
    """And then added: in one sum over all steps an H200 erred twice as much as cuDNN with a rounding to spare."""
    one = next(one for one in wanted if (one.kernel, one.target, one.precision) == (kernel, "sm_90", "float32"))
    blocks = dict(block.split("=") for block in one.blocks.split())
    sums = math.prod(int(blocks[side]) for side in sides.split())
    assert count(one.compile().loop, "FADD") >= sums // (32 * one.warps)
