"""No kernel leaves its tensors, races, or leaves a part of an output unwritten; and the guard that says so can fail."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import memory_guard
import pytest
import torch
import triton
import triton.language as tl
from cases import Case, make_inputs
from memory_guard import GuardError, Launch, Report, guarded
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from triton.runtime import interpreter
from triton.runtime.jit import KernelInterface
from triton.tools.tensor_descriptor import TensorDescriptor

from spconv_triton import SPConv2d, launch
from spconv_triton.dispatch import INTERPRETED
from spconv_triton.geometry import Geometry
from spconv_triton.kernels import tuning
from spconv_triton.launch import branch_norm, descriptor, gradients_descriptor

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the guard watches Triton's interpreter: TRITON_INTERPRET=1")

STATISTICS_AND_GATE = {"window_statistics", "gate_planes"}
KERNELS = {
    "fusion": {"fusion_statistics", "fusion_blend", "fusion_blend_grad"},
    "branch": {"branch_forward", "input_grad", "weight_grad", "finish_weights"},
    "batch norm": {"branches_forward", "sample_moments", "norm_gate", "norm_blend"},
    "batch norm backward": {
        *("norm_sums", "norm_coefficients", "norm_blend_grad"),
        *("weight_grad", "finish_weights", "input_grad"),
    },
    "flat": {*STATISTICS_AND_GATE, "onepass_forward"},
    "pooling": {"pool_windows"},
    "flat backward": {"weight_grad", "gate_grad", "finish_weights", "input_grad"},
    "descriptor": {*STATISTICS_AND_GATE, "onepass_descriptor"},
    "descriptor backward": {"weight_grad_descriptor", "gate_grad", "finish_weights", "input_grad_descriptor"},
}
"""What the tests below run under the guard, which each of them asserts."""

LAYERS = (
    Case("one-channel-groups", 2, 4, 2, (3, 5)),
    Case("no-block-divides", 2, 20, 18, (5, 3), kernel_size=(1, 3), padding=(0, 1), groups=1, alpha=0.85),
    Case("one-column", 2, 6, 4, (9, 1), alpha=0.67),
    Case("one-row", 2, 6, 4, (1, 9), alpha=0.67),
    Case("one-pixel", 17, 2, 1, (1, 1), kernel_size=(1, 3), padding=(0, 1), groups=1),  # more than a block of samples
    Case("slices", 1, 4, 2, (33, 35), kernel_size=(1, 1), padding=(0, 0), groups=1),  # sums over pixels are split
    Case("stride-2-odd", 2, 6, 4, (5, 7), stride=(2, 2), alpha=0.67),
    Case("stride-3-odd", 1, 6, 4, (10, 7), stride=(3, 3), alpha=0.67),
    Case("stride-past-the-window", 1, 6, 4, (7, 8), kernel_size=(1, 3), stride=(3, 2), padding=(0, 1), alpha=0.67),
    Case("strided-and-dilated", 1, 6, 4, (9, 8), stride=(2, 3), dilation=(3, 2), padding=(3, 0), alpha=0.67),
    Case("asymmetric", 1, 6, 4, (9, 6), kernel_size=(5, 1), padding=(3, 2), dilation=(2, 1), alpha=0.67),
    Case("no-padding", 1, 6, 4, (4, 5), padding=(0, 0), alpha=0.67),
    Case("wide-padding", 1, 6, 4, (2, 3), padding=(4, 3), alpha=0.67),
)
BY_NAME = {case.name: case for case in LAYERS}

ALPHA_1 = Case("alpha-1", 2, 3, 6, (4, 5), groups=3, alpha=1.0)
TABLES = [table for table in vars(tuning).values() if isinstance(table, tuple) and isinstance(table[0], triton.Config)]

TILED = Case("tiled", 3, 64, 64, (5, 6), groups=1)

# BLOCK_N, BLOCK_H, BLOCK_W of boxes that hang over the edges of images and batch, and how many taps they visit.
BOXES = (
    ((1, 8, 16), 9, replace(TILED, batch=1, size=(9, 17))),
    ((4, 4, 4), 9, replace(TILED, batch=5)),
    ((32, 1, 2), 9, replace(TILED, batch=35, size=(1, 3))),
    ((16, 2, 2), 9, replace(TILED, size=(6, 6), stride=(2, 2))),
)


def layer_inputs(case: Case, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor | None], Tensor, Geometry]:
    """x, weights and biases, a gradient of the output, and the geometry."""
    inputs = make_inputs(case, dtype, branch_bias=True)
    tensors = (inputs.x, inputs.weight_gwc, inputs.weight_pwc, inputs.weight_redundant, inputs.bias, inputs.branch_bias)
    grad = torch.randn(case.batch, case.out_channels, *case.output_size()).to(dtype)
    return (
        [t if t is None else t.detach() for t in tensors],
        grad.contiguous(memory_format=torch.channels_last),
        case.geometry,
    )


def forward(tensors: list[Tensor | None], geometry: Geometry, path: str, **options: Any) -> tuple[list[Tensor], Report]:
    with guarded() as report, set_wrap_triton_enabled(False):
        return list(launch.spconv2d(*tensors, geometry, path=path, **options)), report


def backward(
    grad: Tensor, tensors: list[Tensor | None], kept: list[Tensor], geometry: Geometry, path: str
) -> tuple[list[Tensor], Report]:
    x, gwc, pwc, redundant, _, branch_bias = tensors
    with guarded() as report, set_wrap_triton_enabled(False):
        grads = launch.spconv2d_backward(grad, x, gwc, pwc, redundant, branch_bias, *kept, geometry, path=path)
    return list(grads), report


def pooling(case: Case) -> set[str]:
    """What the backward of a layer at a stride runs besides."""
    return set() if case.stride == (1, 1) else KERNELS["pooling"]


def sliced(x: Tensor, before: int, behind: int) -> Tensor:
    """The same values as a slice of the channels of a wider tensor."""
    wide = torch.nn.functional.pad(x, (0, 0, 0, 0, before, behind)).contiguous(memory_format=torch.channels_last)
    return wide[:, before : before + x.shape[1]]


def check_flat(case: Case) -> list[Launch]:
    tensors, grad, geometry = layer_inputs(case)
    (_, *kept), report = forward(tensors, geometry, "flat")
    assert report.kernels == KERNELS["flat"]
    _, of_backward = backward(grad, tensors, kept, geometry, "flat")
    assert of_backward.kernels == KERNELS["flat backward"] | pooling(case)
    return report.launches + of_backward.launches


def check_branch(case: Case) -> list[Launch]:
    """On the first alpha L channels of x, a slice."""
    (x, gwc, pwc, *_), grad, geometry = layer_inputs(case)
    x3 = x[:, : case.representative]
    with guarded() as report, set_wrap_triton_enabled(False):
        launch.representative_branch(x3, gwc, pwc, geometry)
        launch.representative_branch_backward(grad, x3, gwc, pwc, geometry)
    assert report.kernels == KERNELS["branch"] | pooling(case)
    assert report.of("branch_forward")[0].scalars["x_stride"] == case.in_channels
    return report.launches


def check_batch_norm(case: Case, dtype: torch.dtype = torch.float32) -> list[Launch]:
    (x, gwc, pwc, redundant, bias, _), grad, geometry = layer_inputs(case, dtype)
    norms = launch.Norms(*(torch.randn(case.out_channels) for _ in range(4)))
    weights = (gwc, pwc, redundant)
    with guarded() as report, set_wrap_triton_enabled(False):
        _, kept = launch.spconv2d_batch_norm(sliced(x, 1, 2), *weights, bias, norms, (1e-5, 1e-5), geometry)
    assert report.kernels == KERNELS["batch norm"]
    with guarded() as of_backward, set_wrap_triton_enabled(False):
        launch.spconv2d_batch_norm_backward(grad, x, *weights, norms, kept, geometry)
    assert of_backward.kernels == KERNELS["batch norm backward"] | pooling(case)
    return report.launches + of_backward.launches


def check_fusion(shape: tuple[int, ...]) -> list[Launch]:
    u3, u1, grad = (torch.randn(shape).half().contiguous(memory_format=torch.channels_last) for _ in range(3))
    with guarded() as report, set_wrap_triton_enabled(False):
        _, gate = launch.gap_softmax_fusion(u3, sliced(u1, 1, 2))
        launch.gap_softmax_fusion_backward(grad.contiguous(), u3, u1, gate)
    assert report.kernels == KERNELS["fusion"]
    return report.launches


@pytest.mark.parametrize("few", [launch.layer.FEW, 0], ids=["few", "blocks"])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_flat_layer(case: Case, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.layer, "FEW", few)
    check_flat(case)


@pytest.mark.parametrize("case", [BY_NAME["one-channel-groups"], BY_NAME["stride-3-odd"], ALPHA_1], ids=str)
def test_branch(case: Case) -> None:
    check_branch(case)


@pytest.mark.parametrize("name", ["one-channel-groups", "one-pixel", "slices", "stride-2-odd"])
def test_batch_norm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(branch_norm.COEFFICIENT_BLOCKS, "BLOCK_N", 16)  # and one-pixel has 17 samples
    check_batch_norm(BY_NAME[name])


@pytest.mark.parametrize("shape", [(3, 18, 7, 5), (1, 1, 1, 1), (2, 40, 9, 1), (1, 3, 17, 19)], ids=str)
def test_fusion(shape: tuple[int, ...]) -> None:
    check_fusion(shape)


@pytest.mark.parametrize("few", [launch.layer.FEW, 0], ids=["few", "blocks"])
@pytest.mark.parametrize("row", range(max(map(len, TABLES))))
def test_every_row_of_the_tables(row: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes the last row, of the smallest blocks; the larger ones hang over the edges further."""
    monkeypatch.setattr(launch.layer, "FEW", few)
    blocks = {}
    for kernel in launch.TUNED_KERNELS:
        table = next(table for table in TABLES if table[-1] is kernel.configs[0])
        config = table[min(row, len(table) - 1)]
        monkeypatch.setattr(kernel, "configs", [config])
        blocks[kernel.base_fn.__name__] = config.kwargs
    case = BY_NAME["no-block-divides"]
    launches = check_flat(case) + check_branch(case) + check_batch_norm(case) + check_fusion((2, 19, 5, 3))
    assert {launched.kernel for launched in launches} >= set(blocks)
    for launched in launches:
        assert launched.scalars.items() >= blocks.get(launched.kernel, {}).items()


def test_more_samples_than_a_block_of_pixels() -> None:
    tensors, _, geometry = layer_inputs(replace(BY_NAME["one-pixel"], batch=66))
    assert forward(tensors, geometry, "flat")[1].of("onepass_forward")[0].grid == (2, 1, 1)


def test_sliced_input_and_scattered_gradient() -> None:
    """The slice is read in place, where every element around it is somebody else's."""
    case = BY_NAME["stride-2-odd"]
    tensors, grad, geometry = layer_inputs(case, torch.float16)
    tensors[0] = sliced(tensors[0], 3, 5)
    (_, *kept), report = forward(tensors, geometry, "flat")
    scattered = grad.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    _, of_backward = backward(scattered, tensors, kept, geometry, "flat")
    read = [*report.of("window_statistics"), *report.of("onepass_forward")]
    for launched in (*read, *of_backward.of("weight_grad"), *of_backward.of("pool_windows")):
        assert launched.scalars["x_stride"] == case.in_channels + 8


def test_epilogue_without_biases() -> None:
    tensors, residual, geometry = layer_inputs(BY_NAME["stride-2-odd"], torch.float16)
    tensors[4:] = None, None
    norm_scale = torch.rand(residual.shape[1])
    _, report = forward(tensors, geometry, "flat", norm_scale=norm_scale, residual=residual, activation="relu")
    assert report.of("onepass_forward")[0].loaded_bytes["residual_ptr"] == 2 * residual.numel()
    assert report.of("gate_planes")[0].unique_loaded_bytes["norm_scale_ptr"] == 4 * norm_scale.numel()


@pytest.mark.parametrize(
    "case",
    [
        Case("merged", 17, 32, 64, (2, 1), groups=8),  # two blocks of samples share the packing
        Case("two-groups", 1, 64, 128, (3, 5)),
        Case("stride-2", 2, 64, 64, (6, 2), stride=(2, 2)),
    ],
    ids=str,
)
def test_descriptor_layer(case: Case) -> None:
    tensors, _, geometry = layer_inputs(case, torch.float16)
    _, report = forward(tensors, geometry, "descriptor")
    assert report.kernels == KERNELS["descriptor"]


def test_packing_in_blocks_that_do_not_divide_the_columns() -> None:
    """176 columns in blocks of 128."""
    case = Case("columns", 1, 48, 64, (2, 1), groups=1, alpha=1 / 3)
    tensors, _, geometry = layer_inputs(case, torch.float16)
    (statistics,) = forward(tensors, geometry, "descriptor")[1].of("window_statistics")
    assert statistics.stored_bytes["packed_ptr"] == 2 * 64 * 176


@pytest.mark.parametrize(("box", "taps", "case"), BOXES, ids=lambda value: str(getattr(value, "size", value)))
def test_boxes(box: tuple[int, int, int], taps: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes hang over every edge, and only what lies inside counts."""
    monkeypatch.setattr(descriptor, "best_tile", lambda *args: descriptor.Tile(*box, 64, 32, 4, 4))
    tensors, residual, _ = layer_inputs(case, torch.float16)
    x, packed, planes = sliced(tensors[0], 8, 16), torch.randn(64, 32 + 9 * 32).half(), torch.rand(3, case.batch, 64)
    with guarded() as report:
        descriptor.convolve(x, packed, *planes, residual, 32, 1, case.stride[0], "relu")
    (launched,) = report.of("onepass_descriptor")
    assert launched.stored_bytes == {"y_desc": 2 * residual.numel()}
    assert launched.loaded_bytes["residual_desc"] == 2 * residual.numel()
    assert launched.unique_loaded_bytes["x_desc"] == 2 * x.numel()
    assert launched.unique_loaded_bytes["packed_desc"] == 2 * 64 * (32 + taps * 32)


@pytest.mark.parametrize(
    "case",
    [
        Case("gate-on-the-weights", 1, 64, 64, (7, 62)),
        Case("gate-on-g", 2, 48, 64, (9, 7), groups=1, alpha=1 / 3),
        Case("eight-groups", 3, 64, 64, (3, 2), groups=8, alpha=0.25),
        Case("phases-of-weights", 1, 64, 64, (14, 124), stride=(2, 2)),
        Case("phases-of-g", 2, 48, 64, (10, 6), groups=1, alpha=1 / 3, stride=(2, 2)),
    ],
    ids=str,
)
def test_descriptor_backward(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients_descriptor, "PROGRAMS", 4 * gradients_descriptor.PROGRAMS)  # a sample in slices
    tensors, grad, geometry = layer_inputs(case, torch.float16)
    tensors[0] = sliced(tensors[0], 8, 3)
    kept = [
        torch.rand(case.batch, case.out_channels),
        torch.randn(case.batch, 9, case.representative).half(),
        torch.randn(case.batch, case.in_channels).half(),
    ]
    _, report = backward(grad, tensors, kept, geometry, "descriptor")
    assert report.kernels == KERNELS["descriptor backward"] | pooling(case)


@pytest.mark.parametrize(
    "case",
    [
        Case("single-pixels", 130, 48, 64, (1, 2), alpha=1 / 3),
        Case("gate-on-the-weights", 2, 128, 128, (4, 31)),
        Case("phases-of-single-pixels", 130, 48, 64, (2, 4), alpha=1 / 3, stride=(2, 2)),
        Case("phases-of-weights", 2, 128, 128, (8, 62), stride=(2, 2)),
    ],
    ids=str,
)
def test_input_gradient_over_descriptors(case: Case) -> None:
    """Alone, on a batch larger than a block and on merged groups."""
    tensors, grad, geometry = layer_inputs(case, torch.float16)
    prepared = gradients_descriptor.prepare(tensors[0], tensors[2], geometry.groups)
    for tensor in prepared[1:]:
        tensor.normal_()
    with guarded() as report:
        window = (case.representative, geometry.groups, case.stride[0])
        dx = gradients_descriptor.input_grad(grad, *prepared[1:], *window)
    (launched,) = report.of("input_grad_descriptor")
    assert launched.stored_bytes == {"dx_desc": 2 * dx.numel()}
    assert launched.unique_loaded_bytes["grad_desc"] == 2 * grad.numel()


def test_module_forward_and_backward() -> None:
    layer = SPConv2d(8, 6, 3, stride=2, padding=1, bias=True, backend="triton")
    x = torch.randn(2, 8, 3, 4, requires_grad=True)
    with guarded() as report:
        layer(x).square().sum().backward()
    assert report.kernels == KERNELS["flat"] | KERNELS["flat backward"] | KERNELS["pooling"]
    assert all(tensor.grad is not None for tensor in (x, *layer.parameters()))


def test_every_kernel_that_is_launched_is_guarded() -> None:
    """A kernel in launch/ that no test here runs fails this one."""
    modules = [importlib.import_module(f"{launch.__name__}.{m.name}") for m in pkgutil.iter_modules(launch.__path__)]
    kernels = {k for module in modules for k in vars(module).values() if isinstance(k, KernelInterface)}
    launched = {getattr(kernel, "base_fn", kernel.fn).__name__ for kernel in kernels}
    assert set().union(*KERNELS.values()) == launched


def test_statistics_read_every_element_once() -> None:
    """Bytes of a real kernel, against what its docstring says."""
    case = BY_NAME["stride-2-odd"]
    tensors, _, geometry = layer_inputs(case, torch.float16)
    (statistics,) = forward(tensors, geometry, "flat")[1].of("window_statistics")
    assert statistics.loaded_bytes == {"x_ptr": 2 * tensors[0].numel()}
    assert statistics.unique_loaded_bytes == statistics.loaded_bytes
    assert statistics.stored_bytes == {"partial_ptr": case.batch * (9 + 2) * case.in_channels * 4}
    assert statistics.grid == (case.batch, 1, 1)


def test_taps_of_a_convolution_are_counted() -> None:
    """A 1 x 3 window reads two pixels of the first and last column, three elsewhere, and one more point-wise."""
    case = Case("row", 1, 2, 1, (1, 6), kernel_size=(1, 3), padding=(0, 1), groups=1, alpha=1.0)
    (x, gwc, pwc, *_), _, geometry = layer_inputs(case)
    with guarded() as report, set_wrap_triton_enabled(False):
        launch.representative_branch(x, gwc, pwc, geometry)
    (counted,) = report.launches
    assert counted.loaded_bytes == {"x_ptr": 4 * 2 * (6 + 3 * 6 - 2), "gwc_ptr": 4 * 2 * 3, "pwc_ptr": 4 * 2}
    assert counted.unique_loaded_bytes["x_ptr"] == 4 * 2 * 6
    assert counted.stored_bytes == {"u3_ptr": 4 * 6}


@triton.jit
def copy(x_ptr, y_ptr, loaded, stored, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < loaded, other=0.0), mask=i < stored)


@triton.jit
def repeat(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Every program stores x."""
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + tl.program_id(0) * BLOCK + i, tl.load(x_ptr + i))


@triton.jit
def store_all(y_ptr, n, BLOCK: tl.constexpr):
    """Every program stores all of y."""
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, i.to(tl.float32), mask=i < n)


@triton.jit
def store_two_lanes(y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i // 2, i.to(tl.float32))


@triton.jit
def store_and_load(y_ptr, z_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, i.to(tl.float32))
    tl.store(z_ptr + i, tl.load(y_ptr + i))


@triton.jit
def sum_by_atomics(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + i), 0))


@triton.jit
def exchange(y_ptr):
    tl.atomic_cas(y_ptr, 0, 1)


@triton.jit
def copy_boxes(x_desc, y_desc, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK - 1
    y_desc.store([first, 0], x_desc.load([first, 0]))


@triton.jit
def load_through_a_number(address, y_ptr):
    tl.store(y_ptr, tl.load(address.to(tl.pointer_type(tl.float32))))


@triton.jit
def store_halves_of_words(y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr.to(tl.pointer_type(tl.int16)) + 2 * tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.int16))


def fault(launched: Callable[[], Any], **options: Any) -> str:
    """The message of the fault that the guard raises."""
    with pytest.raises(GuardError) as caught, guarded(**options):
        launched()
    return str(caught.value)


def test_clean_kernel_passes_and_is_counted() -> None:
    x, y = torch.randn(13), torch.empty(13)
    with guarded() as report:
        copy[(4,)](x, y, 13, 13, BLOCK=4)
    assert torch.equal(x, y)
    (counted,) = report.launches
    assert (counted.kernel, counted.grid) == ("copy", (4, 1, 1))
    assert counted.scalars == {"loaded": 13, "stored": 13, "BLOCK": 4}
    assert counted.loaded_bytes == {"x_ptr": 52}
    assert counted.stored_bytes == {"y_ptr": 52}


def test_repeated_loads_are_counted_once_as_unique() -> None:
    x = torch.randn(4).half()
    with guarded() as report:
        repeat[(3,)](x, torch.empty(3, 4).half(), BLOCK=4)
        repeat[(3,)](x[:1].expand(4), torch.empty(3).half(), BLOCK=1)
    assert [launched.loaded_bytes for launched in report.launches] == [{"x_ptr": 24}, {"x_ptr": 6}]
    assert [launched.unique_loaded_bytes for launched in report.launches] == [{"x_ptr": 8}, {"x_ptr": 2}]


def test_load_outside() -> None:
    message = fault(lambda: copy[(4,)](torch.randn(13), torch.empty(13), 14, 13, BLOCK=4))
    assert "copy: program (3, 0, 0) loads x_ptr (shape [13], strides [1]) at element 13 (byte 52)" in message
    assert "1 of 2 lanes" in message


def test_store_outside() -> None:
    message = fault(lambda: copy[(4,)](torch.randn(14), torch.empty(13), 14, 14, BLOCK=4))
    assert "copy: program (3, 0, 0) stores y_ptr (shape [13], strides [1]) at element 13 (byte 52)" in message


def test_neighbours_of_a_view_are_outside() -> None:
    """Both in the storage of the argument and in another argument."""
    halves = torch.randn(2, 8)
    message = fault(lambda: copy[(2,)](halves[0], halves[1], 9, 8, BLOCK=8))
    assert "program (1, 0, 0) loads x_ptr (shape [8], strides [1]) at element 8 (byte 32)" in message
    channels = torch.randn(4, 6)[:, 1:5]
    message = fault(lambda: copy[(1,)](channels, torch.empty(8), 8, 8, BLOCK=8))
    assert "loads x_ptr (shape [4, 4], strides [6, 1]) at element 4 (byte 16)" in message


def test_nothing_outside_is_touched() -> None:
    memory = torch.zeros(16)
    fault(lambda: copy[(2,)](torch.ones(16), memory[:12], 16, 16, BLOCK=8))
    assert not memory[12:].any()


def test_store_by_two_programs() -> None:
    message = fault(lambda: store_all[(1, 3)](torch.empty(6), 6, BLOCK=8))
    assert "store_all: program (0, 1, 0) stores y_ptr[0], which program (0, 0, 0) has stored" in message


def test_store_by_two_lanes() -> None:
    message = fault(lambda: store_two_lanes[(1,)](torch.empty(4), BLOCK=8))
    assert "program (0, 0, 0) stores y_ptr[0], which program (0, 0, 0) has stored" in message


def test_element_left_out() -> None:
    message = fault(lambda: copy[(3,)](torch.randn(14), torch.empty(2, 7), 14, 14, BLOCK=4))
    assert "copy never stores 2 of 14 elements of y_ptr (shape [2, 7], strides [7, 1]), first y_ptr[1, 5]" in message
    message = fault(lambda: copy[(2,)](torch.randn(8), torch.empty(8), 8, 0, BLOCK=4))
    assert "copy never stores 8 of 8 elements of y_ptr" in message


def test_buffer_may_be_exempted_by_name() -> None:
    y = torch.zeros(16)
    with guarded(partly_stored={"copy.y_ptr"}) as report:
        copy[(3,)](torch.ones(16), y, 16, 16, BLOCK=4)
    assert y.sum() == 12
    assert report.kernels == {"copy"}
    fault(lambda: copy[(3,)](torch.ones(16), y, 16, 16, BLOCK=4), partly_stored={"other.y_ptr", "copy.x_ptr"})


@pytest.mark.parametrize(
    ("first_loaded", "first_stored", "message"),
    [
        (0, 4, "program (1, 0, 0) loads x_ptr[4], which program (0, 0, 0) has stored in the same launch"),
        (4, 0, "program (1, 0, 0) stores y_ptr[4], which program (0, 0, 0) has loaded in the same launch"),
    ],
    ids=["load-after-store", "store-after-load"],
)
def test_load_and_store_by_different_programs(first_loaded: int, first_stored: int, message: str) -> None:
    """Through two arguments that share memory, in either order."""
    memory = torch.zeros(12)
    x, y = memory[first_loaded:][:8], memory[first_stored:][:8]
    assert message in fault(lambda: copy[(2,)](x, y, 8, 8, BLOCK=4))


def test_load_of_what_the_program_stored() -> None:
    message = fault(lambda: store_and_load[(1,)](torch.empty(8), torch.empty(8), BLOCK=8))
    assert "program (0, 0, 0) loads y_ptr[0], which program (0, 0, 0) has stored in the same launch" in message


def test_in_place_by_one_program_is_legal() -> None:
    memory = torch.randn(8)
    with guarded() as report:
        copy[(2,)](memory, memory, 8, 8, BLOCK=4)
    assert report.kernels == {"copy"}


@pytest.mark.parametrize("launched", [
    lambda: sum_by_atomics[(2,)](torch.randn(8), torch.zeros(1), BLOCK=4),
    lambda: exchange[(1,)](torch.zeros(1, dtype=torch.int32)),
])  # fmt: skip
def test_atomics_are_refused(launched: Callable[[], Any]) -> None:
    assert "program (0, 0, 0) uses an atomic" in fault(launched)


def test_descriptors_clip_and_count_what_is_inside() -> None:
    x, y = torch.randn(7, 4), torch.empty(7, 4)
    with guarded() as report:
        copy_boxes[(2,)](TensorDescriptor.from_tensor(x, [4, 4]), TensorDescriptor.from_tensor(y, [4, 4]), BLOCK=4)
    assert torch.equal(x, y)
    assert report.launches[0].loaded_bytes == {"x_desc": x.numel() * 4}
    assert report.launches[0].stored_bytes == {"y_desc": x.numel() * 4}


def test_descriptor_that_is_larger_than_its_tensor() -> None:
    x, y = torch.randn(8, 4), torch.empty(8, 4)
    boxes = [TensorDescriptor(t, [8, 4], [4, 1], [4, 4]) for t in (x[:6], y)]
    message = fault(lambda: copy_boxes[(3,)](*boxes, BLOCK=4))
    assert "copy_boxes: program (1, 0, 0) loads x_desc (shape [6, 4], strides [4, 1]) at element 24" in message


def test_pointer_that_no_argument_gave() -> None:
    x = torch.randn(1)
    message = fault(lambda: load_through_a_number[(1,)](x.data_ptr(), torch.empty(1)))
    assert "loads at a pointer that is none of its arguments'" in message


def test_elements_of_another_size() -> None:
    message = fault(lambda: store_halves_of_words[(1,)](torch.empty(8), BLOCK=8))
    assert "stores 2 bytes at elements of y_ptr (shape [8], strides [1]), which have 4" in message


def test_interpreter_is_left_as_it_was() -> None:
    names = ("GridExecutor.__call__", "GridExecutor._init_args_hst", "InterpreterBuilder.create_atomic_rmw")
    owners = [(getattr(interpreter, owner), name) for owner, name in (name.split(".") for name in names)]
    owners += [(interpreter, "_interpreter"), (interpreter, "_implicit_cvt")]
    before = [getattr(owner, name) for owner, name in owners]
    fault(lambda: copy[(2,)](torch.randn(8), torch.empty(8), 9, 9, BLOCK=8))
    assert [getattr(owner, name) for owner, name in owners] == before


def test_compiled_kernels_cannot_be_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_guard, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), guarded():
        pass
