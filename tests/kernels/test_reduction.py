"""The reductions of the backward: sums in fixed order, written in the parameters' own layouts."""

from __future__ import annotations

import pytest
import torch
from cases import BY_NAME, assert_agrees, assert_within_budget, make_inputs, output_grad, run
from torch import Tensor

from spconv_triton import functional
from spconv_triton.geometry import Geometry
from spconv_triton.launch.gradients import GateGrad, finish_weight_grads, gate_gradient

pytestmark = pytest.mark.usefixtures("poisoned_empty")

GEOMETRY = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 2)


def random_gate(batch: int, outputs: int, device: str) -> tuple[Tensor, Tensor]:
    """gamma / beta, and parts of A over 5 K blocks and 3 slices."""
    return torch.rand(batch, outputs, device=device), torch.randn(5, batch, 3, outputs, device=device)


@pytest.mark.parametrize("bias", [False, True])
def test_gate_gradient(bias: bool, device: str) -> None:
    batch, outputs, redundant_blocks = 3, 70, 2
    ratio, parts = random_gate(batch, outputs, device)
    grad = torch.randn(batch, outputs, 5, 7, device=device).contiguous(memory_format=torch.channels_last)
    branch_bias = torch.randn(outputs, 2, device=device).t() if bias else None
    means = grad.new_empty(0), grad.new_empty(0)
    gate = gate_gradient(grad, parts, redundant_blocks, ratio, branch_bias, *means)
    a1, a3 = parts[:redundant_blocks].double().sum((0, 2)), parts[redundant_blocks:].double().sum((0, 2))
    beta = 1 / (1 + ratio.double())
    sums = grad.double().sum((2, 3))
    if branch_bias is not None:
        a3, a1 = a3 + branch_bias[0].double() * sums, a1 + branch_bias[1].double() * sums
    delta = beta * (1 - beta) * (a3 - a1)
    torch.testing.assert_close(gate.shift.double(), delta / 35, atol=1e-6, rtol=1e-5)
    if bias:
        terms = torch.stack([beta * sums + delta, (1 - beta) * sums - delta])
        torch.testing.assert_close(gate.terms.double(), terms, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 3, 2)], ids=str)
def test_gradients_have_the_strides_of_the_weights(
    order: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> None:
    def weight(*shape: int) -> Tensor:
        """Dense, its dimensions in memory in ``order``."""
        memory = torch.randn([shape[i] for i in order], device=device, dtype=dtype)
        return memory.permute([order.index(i) for i in range(4)])

    weights = weight(36, 9, 3, 3), weight(36, 18, 1, 1), weight(36, 10, 1, 1)
    partial = torch.randn(3, sum(w.numel() for w in weights), device=device)
    shift = torch.randn(20, 36, device=device)
    tap_mean, pool_mean = (torch.randn(20, *shape, device=device).to(dtype) for shape in ((9, 18), (28,)))
    gate = GateGrad(shift, None, None, tap_mean, pool_mean, 35)
    *grads, d_branch_bias = finish_weight_grads(partial, weights, gate, GEOMETRY)
    assert d_branch_bias.shape == (0, 36)

    delta, tap_mean, pool_mean = 35 * shift.double(), tap_mean.double(), pool_mean.double()
    total = partial.double().sum(0).split([weights[2].numel(), weights[1].numel(), weights[0].numel()])
    by_group = torch.einsum("ngm,ntgc->gmtc", delta.view(20, 2, 18), tap_mean.view(20, 9, 2, 9)).reshape(36, 3, 3, 9)
    expected = (
        (total[2].view(36, 3, 3, 9) + by_group).permute(0, 3, 1, 2),
        (total[1].view(36, 18) + delta.T @ pool_mean[:, :18])[:, :, None, None],
        (total[0].view(36, 10) - delta.T @ pool_mean[:, 18:])[:, :, None, None],
    )
    for grad, like, exact in zip(grads, weights, expected, strict=True):
        assert grad.stride() == torch.empty_like(like).stride()
        assert_within_budget("weight", grad, exact.to(dtype), exact, condition=20**0.5)


def test_the_same_bits_every_time(device: str) -> None:
    inputs = make_inputs(BY_NAME["narrow-groups"], torch.float16, device=device, branch_bias=True)
    grad = output_grad(inputs)
    first, second = (run(functional.spconv2d, inputs, grad, backend="triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bias_gradients_in_half_precision(dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(BY_NAME["narrow-groups"], dtype, device=device, mean=3.0, branch_bias=True)
    assert_agrees(functional.spconv2d, inputs, backend="triton")


def test_layer_without_pixels_or_samples(device: str) -> None:
    case = BY_NAME["plain"]
    inputs = make_inputs(case, device=device, branch_bias=True)
    inputs.x = inputs.x.detach()[:0].requires_grad_()
    got = run(
        functional.spconv2d, inputs, torch.empty(0, case.out_channels, *case.size, device=device), backend="triton"
    )
    assert got.pop("x").shape == inputs.x.shape
    for name, value in got.items():
        assert not value.any(), name
