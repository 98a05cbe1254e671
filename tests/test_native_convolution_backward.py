"""Gradients of convolutions on the native path: a matrix product over few pixels, oneDNN's over others."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spconv_triton.native import convolution_backward as backward
from spconv_triton.native.convolution import convolution

# x, weight, stride, padding, dilation, groups
WINDOWS = {
    "plain": ((2, 8, 7, 7), (6, 4, 3, 3), (1, 1), (1, 1), (1, 1), 2),
    "point-wise": ((3, 5, 4, 6), (7, 5, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "strides": ((2, 12, 9, 8), (8, 3, 3, 5), (2, 3), (1, 2), (1, 1), 4),
    "dilations": ((1, 6, 11, 10), (4, 6, 5, 3), (1, 2), (4, 2), (2, 3), 1),
    "no-padding": ((2, 4, 8, 5), (4, 2, 3, 3), (1, 1), (0, 0), (1, 1), 2),
    "padding-alone": ((2, 4, 1, 1), (4, 2, 3, 3), (1, 1), (3, 3), (2, 2), 2),
    "one-column": ((4, 8, 6, 1), (8, 4, 3, 3), (2, 1), (1, 1), (1, 1), 2),
    "one-pixel": ((1, 16, 3, 3), (8, 16, 3, 3), (1, 1), (0, 0), (1, 1), 1),
}


def make(name: str, dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]:
    """x, weight, the gradient by the output, and the window."""
    x_shape, weight_shape, *window = WINDOWS[name]
    x, weight = torch.randn(x_shape).to(dtype), torch.randn(weight_shape).to(dtype)
    grad = torch.randn(F.conv2d(x.double(), weight.double(), None, *window).shape).to(dtype)
    return *(tensor.clone(memory_format=layout) for tensor in (x, weight, grad)), tuple(window)


def exact(x: Tensor, weight: Tensor, grad: Tensor, window: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    leaves = [tensor.double().requires_grad_() for tensor in (x, weight)]
    return torch.autograd.grad(F.conv2d(*leaves, None, *window), leaves, grad.double())


@pytest.mark.parametrize("needed", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("few", [0, 1 << 30], ids=["oneDNN", "product"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("name", WINDOWS)
def test_agrees_with_autograd(
    name: str, layout: torch.memory_format, few: int, needed: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backward, "FEW_PIXELS", few)
    x, weight, grad, window = make(name, torch.float32, layout)
    before = [tensor.clone() for tensor in (x, weight, grad)]
    results = backward.convolution_backward(grad, x, weight, needed, *window)
    assert [result is not None for result in results] == list(needed)
    for result, best in zip(results, exact(x, weight, grad, window), strict=True):
        if result is not None:
            torch.testing.assert_close(result.double(), best, rtol=1e-5, atol=1e-5 * best.abs().max().item())
    assert all(torch.equal(now, then) for now, then in zip((x, weight, grad), before, strict=True))


def test_only_few_pixels_of_float32_are_a_product() -> None:
    def is_product(pixels: int, weights: int, *, alone: bool = True, dtype: torch.dtype = torch.float32) -> bool:
        return backward.unfolding_pays(torch.ones(1, 1, 1, pixels), torch.ones(1, dtype=dtype), weights, alone=alone)

    few, large = backward.FEW_PIXELS, backward.LARGE_WEIGHT
    assert is_product(few, 1)
    assert not is_product(few + 1, large)
    assert is_product(few // 2, 1, alone=False)
    assert not is_product(few, 1, alone=False)
    assert is_product(few, large, alone=False)
    assert not is_product(0, large)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert not is_product(1, large, dtype=dtype)
    with FlopCounterMode(display=False):
        assert not is_product(1, large), "FLOP counters know convolutions"


@pytest.mark.parametrize("name", ["plain", "point-wise"])
def test_weights_gradient_is_ready_for_a_parameter_in_channels_last(name: str) -> None:
    """Else autograd copies it."""
    x, weight, grad, window = make(name, torch.float32, torch.channels_last)
    gradient = backward.convolution_backward(grad, x, weight, (False, True), *window)[1]
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_agrees_in_any_window(dtype: torch.dtype) -> None:
    """Also in those that oneDNN gets wrong on some processors, where it overwrites memory, or crashes."""
    draw = random.Random(int(torch.randint(2**31, ())))
    for _ in range(100):
        x_shape, weight_shape, *window = draw_window(draw)
        layout = draw.choice([torch.contiguous_format, torch.channels_last])
        x, weight = (torch.randn(shape).to(dtype).clone(memory_format=layout) for shape in (x_shape, weight_shape))
        y = convolution(x, weight, None, *window)
        grad = torch.randn(y.shape).to(dtype).clone(memory_format=torch.channels_last)
        results = (y, *backward.convolution_backward(grad, x, weight, (True, True), *window))
        exact_y = F.conv2d(x.double(), weight.double(), None, *window)
        for result, best in zip(results, (exact_y, *exact(x, weight, grad, window)), strict=True):
            assert result.shape == best.shape, (x_shape, weight_shape, window)
            error, largest = (result.double() - best).abs().max().item(), best.abs().max().item()
            # Of what is wrong, not of what is imprecise: float32 sums of 1,680 pixels one after the other.
            roundings = 64 if dtype == torch.float32 else 16
            assert error <= roundings * torch.finfo(dtype).eps * (largest + 1), (x_shape, weight_shape, window, layout)


def draw_window(draw: random.Random) -> tuple[Any, ...]:
    """Shapes of x and weight, stride, padding, dilation and groups, whose output has a pixel."""
    while True:
        batch, groups, inputs, outputs = (draw.choice(of) for of in ((1, 2, 3), (1, 2, 4), (1, 4, 8, 24), (2, 8, 24)))
        kernel, stride = (tuple(draw.choices(of, k=2)) for of in ((1, 3, 5), (1, 1, 2, 3)))
        dilation = tuple(1 if size == 1 else draw.choice((1, 1, 2, 3)) for size in kernel)
        halves = tuple(spread * (size // 2) for spread, size in zip(dilation, kernel, strict=True))
        padding = draw.choice([(0, 0), halves, halves, tuple(draw.choices((0, 1, 2, 3), k=2))])
        size = draw.choice((1, 2, 3, 7, 14)), draw.choice((1, 2, 3, 5, 14, 40))
        axes = zip(size, padding, halves, strict=True)
        if all(pixels + 2 * pad > 2 * half for pixels, pad, half in axes):
            shapes = (batch, groups * inputs, *size), (groups * outputs, inputs, *kernel)
            return *shapes, stride, padding, dilation, groups
