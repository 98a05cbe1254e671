"""The gradients over tensor-map descriptors against float64, on whatever runs here."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from cases import BY_NAME, Case, Inputs, assert_agrees, assert_within_budget, make_inputs, output_grad, run
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch.nn.functional import avg_pool2d, unfold

from spconv_triton import functional, launch, reference
from spconv_triton.dispatch import INTERPRETED
from spconv_triton.geometry import Geometry, resolve
from spconv_triton.launch import gradients
from spconv_triton.launch import gradients_descriptor as descriptor
from spconv_triton.launch.common import has_tile_hardware

pytestmark = pytest.mark.usefixtures("poisoned_empty")


# The gate multiplies the weights in the first, g in the rest.
TRANSPOSED = (
    Case("merged", 2, 128, 128, (4, 31)),
    Case("mixed", 3, 64, 64, (7, 64)),
    Case("mixed-1/4", 2, 64, 64, (4, 62), alpha=0.25),
    Case("few-programs", 2, 64, 128, (15, 14)),
)
SHARED = (
    Case("four-samples", 3, 128, 128, (7, 8)),
    Case("more-samples", 9, 64, 64, (4, 3)),
    Case("pairs", 33, 64, 64, (2, 2)),
    Case("single-pixels", 100, 48, 64, (2, 1), alpha=1 / 3),
    Case("one-pixel", 3, 64, 64, (1, 1)),
    Case("one-group", 3, 128, 64, (7, 7), groups=1),
    Case("four-groups", 3, 64, 128, (5, 4), groups=4),
    Case("wide-groups", 2, 96, 128, (5, 4), alpha=2 / 3),
    Case("alpha-1/4", 2, 128, 64, (5, 9), alpha=0.25),
    Case("alpha-3/4", 2, 64, 64, (6, 5), alpha=0.75),
)
STRIDED = (
    Case("phases-of-weights", 2, 128, 128, (8, 62), stride=(2, 2)),
    Case("phases-mixed", 3, 64, 64, (14, 128), stride=(2, 2)),
    Case("phases-few", 2, 128, 256, (30, 28), stride=(2, 2)),
    Case("phases-of-samples", 3, 128, 128, (14, 16), stride=(2, 2)),
    Case("phases-pairs", 17, 64, 64, (4, 4), stride=(2, 2)),
    Case("phases-one-pixel", 3, 64, 64, (2, 2), stride=(2, 2)),
    Case("phases-single-pixels", 100, 48, 64, (2, 4), alpha=1 / 3, stride=(2, 2)),
    Case("phases-four-groups", 2, 64, 128, (10, 8), groups=4, stride=(2, 2)),
    Case("phases-1/4", 2, 128, 64, (10, 18), alpha=0.25, stride=(2, 2)),
)


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    if not (INTERPRETED or has_tile_hardware(torch.empty(0, device=device))):
        pytest.skip("needs tensor-map descriptors: Hopper, Blackwell or TRITON_INTERPRET=1")
    new_empty = torch.Tensor.new_empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        return new_empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Every layer that the kernels support takes them; counts the calls."""
    monkeypatch.setattr(descriptor, "can_run", descriptor.supports)
    counted = mock.Mock(side_effect=descriptor.input_tile)
    monkeypatch.setattr(descriptor, "input_tile", counted)
    return counted


def backward(inputs: Inputs, grad: Tensor) -> dict[str, Tensor]:
    """Gradients by name, with what the forward keeps computed here: its kernels would take most of the time."""
    tensors = {name: t.detach() for name, t in inputs.tensors().items() if name != "bias"}
    x, *weights = (tensors[name] for name in ("x", "weight_gwc", "weight_pwc", "weight_redundant"))
    aL, groups = weights[1].shape[1], inputs.window["groups"]
    stride = inputs.window["stride"]
    windows = unfold(x[:, :aL].double(), 3, padding=1, stride=stride).mean(2).view(len(x), aL, 9)
    pooled = avg_pool2d(x.double(), stride).mean((2, 3))
    by_group = (t.double().unflatten(axis, (groups, -1)) for axis, t in ((1, windows), (0, weights[0].flatten(2))))
    s3 = torch.einsum("ngct,gmct->ngm", *by_group).flatten(1) + pooled[:, :aL] @ weights[1].double().flatten(1).T
    difference = s3 - pooled[:, aL:] @ weights[2].double().flatten(1).T
    bias = tensors.get("branch_bias")
    if bias is not None:
        difference = difference + bias[0].double() - bias[1].double()
    ratio = torch.exp(-difference.clamp(min=-60)).float()
    kept = ratio, windows.transpose(1, 2).to(x.dtype).contiguous(), pooled.to(x.dtype)
    geometry = Geometry((3, 3), stride, (1, 1), (1, 1), groups)
    grads = launch.spconv2d_backward(grad, x, *weights, bias, *kept, geometry, path="descriptor")
    return dict(zip(("x", "weight_gwc", "weight_pwc", "weight_redundant", "branch_bias"), grads, strict=True))


def assert_gradients_agree(inputs: Inputs, *, condition: float = 1.0) -> dict[str, Tensor]:
    grad = output_grad(inputs)
    got = backward(inputs, grad)
    same_dtype = run(reference.spconv2d, inputs.to(inputs.x.dtype), grad)
    exact = run(reference.spconv2d, inputs.to(torch.float64), grad)
    for name in set(inputs.tensors()) - {"bias"}:
        assert_within_budget(name, got[name], same_dtype[name], exact[name], condition=condition)
    return got


def check(case: Case, dtype: torch.dtype, device: str, *, condition: float = 1.0, **options: Any) -> None:
    assert_gradients_agree(make_inputs(case, dtype, device=device, **options), condition=condition)


def tile_of(case: Case) -> descriptor.InputTile:
    plan = descriptor.packing(case.in_channels, case.representative, case.out_channels, case.groups)
    shape = (case.batch, case.in_channels, *case.output_size())
    return descriptor.input_tile(plan, shape, case.representative, case.groups, case.stride[0])


@pytest.mark.drawn(15, "case", TRANSPOSED + SHARED + STRIDED, ids=str)
def test_agrees_with_float64(case: Case, device: str) -> None:
    assert tile_of(case).transposed == (case in TRANSPOSED + STRIDED[:3])
    check(case, torch.float16, device)


@pytest.mark.parametrize("case", [TRANSPOSED[1], SHARED[0], STRIDED[1]], ids=str)
def test_bfloat16(case: Case, device: str) -> None:
    check(case, torch.bfloat16, device)


@pytest.mark.parametrize("case", [TRANSPOSED[0], SHARED[1], STRIDED[4]], ids=str)
def test_large_mean_and_branch_bias(case: Case, device: str) -> None:
    check(case, torch.float16, device, mean=5.0, branch_bias=True)


@pytest.mark.parametrize("gate", [-50.0, 50.0])
@pytest.mark.parametrize("case", [SHARED[0], STRIDED[3]], ids=str)
def test_saturated_gate(case: Case, gate: float, device: str) -> None:
    check(case, torch.float16, device, condition=abs(gate), gate=gate)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("case", [*TRANSPOSED[:2], SHARED[0], *STRIDED[:2]], ids=str)
def test_the_branch_that_a_saturated_gate_leaves_little_of(case: Case, sign: int, device: str) -> None:
    """Beside the gradients of the other branch's channels no error in its own would show, and weights times such a
    gate are smaller than half precision's normal numbers; a loss scale makes g as much larger."""
    gate = sign * (11 + 3 * torch.rand(()).item())
    inputs = make_inputs(case, torch.float16, device=device, gate=gate)
    grad = output_grad(inputs) * 200
    results = (
        backward(inputs, grad),
        *(run(reference.spconv2d, inputs.to(t), grad) for t in (grad.dtype, torch.float64)),
    )
    got, same_dtype, exact = (result["x"].tensor_split([case.representative], 1) for result in results)
    for branch, three in zip(("dx3", "dx1"), zip(got, same_dtype, exact, strict=True), strict=True):
        assert_within_budget(branch, *three, condition=abs(gate))


def test_a_gate_s_gradient_of_any_size(device: str) -> None:
    """What is spread over the pixels comes of products in half precision, which holds neither 1e-30 nor 1e30."""
    case = Case("sizes", 4, 64, 64, (3, 5))
    inputs = make_inputs(case, torch.float16, device=device)
    x, *weights = (t.detach() for t in (inputs.x, inputs.weight_gwc, inputs.weight_pwc, inputs.weight_redundant))
    shift = torch.randn(4, 64, device=device) * torch.tensor([1e-30, 0.0, 1.0, 1e30], device=device)[:, None]
    means = torch.zeros(4, 9, 32, device=device).half(), torch.zeros(4, 64, device=device).half()
    gate = gradients.GateGrad(shift, None, None, *means, pixels=15)
    prepared = descriptor.prepare(x, weights[1], case.groups)
    partial = torch.zeros(1, 64 * (64 + 8 * 16), device=device)
    with set_wrap_triton_enabled(False):
        gradients.finish_weight_grads(partial, weights, gate, case.geometry, prepared)

    gwc, pwc, redundant = (w.double() for w in weights)
    by_group = gwc.sum((2, 3)).unflatten(0, (case.groups, -1))
    own = torch.einsum("ngm,gmc->ngc", shift.double().unflatten(1, (case.groups, -1)), by_group).flatten(1)
    spread = shift.double() @ pwc[:, :, 0, 0] + own, -(shift.double() @ redundant[:, :, 0, 0])
    largest = shift.abs().amax(1, keepdim=True).double()
    error = (prepared.constant[0].double() - torch.cat(spread, 1)).abs()
    assert (error <= 1e-5 * largest).all()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_samples_in_slices(batch: int, stride: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large map of few samples: the weight gradient splits each, the last slice running out of rows."""
    monkeypatch.setattr(descriptor, "PROGRAMS", 4 * descriptor.PROGRAMS)
    case = Case("sliced", batch, 64, 64, (39 * stride, 67 * stride), stride=(stride, stride))
    inputs = make_inputs(case, torch.float16, device=device)
    x, *weights = (t.detach() for t in (inputs.x, inputs.weight_gwc, inputs.weight_pwc, inputs.weight_redundant))
    ratio = torch.rand(batch, 64, device=device)
    grad = torch.randn(batch, 64, 39, 67, device=device).half().contiguous(memory_format=torch.channels_last)
    pooled = gradients.pooled_windows(x, (39, 67), case.geometry)
    partial, parts = descriptor.weight_grad(grad, x, pooled, *weights, ratio, case.groups, stride)
    assert parts.shape[2] > 1
    assert partial.shape[0] > batch
    redundant = torch.einsum("nmhw,nchw->nmc", grad.double(), (x if pooled is None else pooled).double()[:, 32:])
    a1 = (redundant * weights[2].double()[:, :, 0, 0]).sum(2)
    tiles = descriptor.redundant_tiles(inputs.x, weights[1], case.groups)
    torch.testing.assert_close(parts[:tiles].double().sum((0, 2)), a1, rtol=1e-4, atol=1e-2)
    gamma = (ratio / (1 + ratio)).double()
    exact = (gamma[:, :, None] * redundant).sum(0).flatten()
    torch.testing.assert_close(partial.double().sum(0)[: exact.numel()], exact, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("case", [SHARED[4], STRIDED[5]], ids=str)
def test_channel_slice_and_weights_of_any_layout(case: Case, device: str) -> None:
    """x is a slice that starts off a 16-byte boundary; the weights' gradients keep their strides."""
    inputs = make_inputs(case, torch.float16, device=device)
    wide = torch.randn(case.batch, case.in_channels + 3, *case.size, device=device).half()
    inputs.x = wide.contiguous(memory_format=torch.channels_last)[:, 3:].requires_grad_()
    inputs.weight_pwc = inputs.weight_pwc.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    got = assert_gradients_agree(inputs)
    for name in ("weight_gwc", "weight_pwc", "weight_redundant"):
        assert got[name].stride() == torch.empty_like(getattr(inputs, name)).stride(), name


@pytest.mark.parametrize("case", [SHARED[0], STRIDED[4]], ids=str)
def test_the_same_bits_every_time(case: Case, device: str) -> None:
    inputs = make_inputs(case, torch.float16, device=device, branch_bias=True)
    grad = output_grad(inputs)
    first, second = (backward(inputs, grad) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_which_layers_are_supported(device: str) -> None:
    def supported(case: Case, dtype: torch.dtype = torch.float16) -> bool:
        inputs = make_inputs(case, dtype, device=device)
        return descriptor.supports(inputs.x, inputs.weight_gwc, inputs.weight_pwc, case.geometry)

    case = SHARED[0]
    assert supported(case)
    assert not supported(case, torch.float32)
    assert supported(STRIDED[0])
    odd = dataclasses.replace(STRIDED[0], size=(7, 62))
    assert not supported(odd), "at a stride, rows come in pairs"
    assert not supported(dataclasses.replace(odd, size=(8, 61))), "and so do columns"
    for change in (
        {"stride": (3, 3)},
        {"stride": (1, 2)},
        {"padding": (0, 1)},
        {"kernel_size": (1, 3)},
        {"dilation": (2, 2)},
    ):
        assert not supported(dataclasses.replace(case, **change)), change
    assert not supported(dataclasses.replace(case, out_channels=96)), "no 64 output channels in a tile"
    assert not supported(dataclasses.replace(case, in_channels=48)), "24 representative channels, a tile takes 16"


def test_a_layer_takes_the_kernels_where_they_run(device: str, forced: mock.Mock) -> None:
    assert_agrees(functional.spconv2d, make_inputs(BY_NAME["tiny"], torch.float16, device=device), backend="triton")
    forced.assert_not_called()
    assert_agrees(functional.spconv2d, make_inputs(SHARED[4], torch.float16, device=device), backend="triton")
    forced.assert_called_once()


@pytest.mark.parametrize("case", [SHARED[4], STRIDED[5]], ids=str)
@pytest.mark.usefixtures("forced")
def test_operator_passes_opcheck(case: Case, device: str) -> None:
    inputs = make_inputs(case, torch.float16, device=device)
    tensors = [t.detach() for t in (inputs.x, inputs.weight_gwc, inputs.weight_pwc, inputs.weight_redundant)]
    ratio, tap_mean, pool_mean = (
        torch.rand(case.batch, *shape, device=device) for shape in ((64,), (9, case.representative), (64,))
    )
    grad = torch.randn(case.batch, 64, 1, 1, device=device).half()
    kept = (ratio, tap_mean.half(), pool_mean.half())
    arguments = (grad, *tensors, None, *kept, case.stride, [1, 1], [1, 1], case.groups)
    torch.library.opcheck(torch.ops.spconv_triton.spconv2d_backward, arguments)
    x, *weights = tensors
    pooled = None if case.stride == (1, 1) else avg_pool2d(x, 2)
    arguments = (grad, x, pooled, *weights, ratio, case.groups, case.stride[0])
    torch.library.opcheck(launch.opaque.weight_grad.operator, arguments)
    prepared = [t.normal_() for t in descriptor.prepare(x, weights[1], case.groups)[1:]]
    arguments = (grad, *prepared, case.representative, case.groups, case.stride[0])
    torch.library.opcheck(launch.opaque.input_grad.operator, arguments)


@pytest.mark.parametrize(("path", "message"), [("portable", "path must be"), ("descriptor", "does not take a layer")])
def test_paths_that_cannot_be_taken_are_refused(path: str, message: str, device: str) -> None:
    grad, x = torch.randn(1, 8, 4, 4, device=device), torch.randn(1, 8, 4, 4, device=device)
    weights = (torch.randn(8, 2, 3, 3), torch.randn(8, 4, 1, 1), torch.randn(8, 4, 1, 1))
    kept = (torch.ones(1, 8), torch.zeros(1, 9, 4), torch.zeros(1, 8))
    tensors = [tensor.to(device) for tensor in (*weights, *kept)]
    with pytest.raises(ValueError, match=message):
        launch.spconv2d_backward(grad, x, *tensors[:3], None, *tensors[3:], resolve(3, 1, 1, 1, 2), path=path)
