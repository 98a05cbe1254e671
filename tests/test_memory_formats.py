"""Results keep the memory format of x, as those of nn.Conv2d do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import every_format, every_layer, make
from torch import Tensor

from spconv_triton import SPConv2d, functional


@every_layer
@every_format
def test_memory_format_is_kept(options: dict[str, Any], memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 8, 9, 7).contiguous(memory_format=memory_format)
    for layer in (make(options), make(options).to(memory_format=torch.channels_last)):
        y = layer(x)
        assert y.is_contiguous(memory_format=memory_format)
        assert not y.is_contiguous(
            memory_format=torch.channels_last if memory_format == torch.contiguous_format else torch.contiguous_format
        )


LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, :8], lambda x: x[..., 1:-1, 1:], lambda x: x[:, :8, :1, :1]],
    ids=["channels", "crop", "pixel"],
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_views_keep_their_format_as_of_conv2d(
    view: Callable[[Tensor], Tensor], layout: torch.memory_format, training: bool
) -> None:
    x = view(torch.randn(2, 12, 7, 6).contiguous(memory_format=layout))
    layer = SPConv2d(x.shape[1], 8, 3, padding=2, backend="native")
    with torch.set_grad_enabled(training):
        y = layer(x)
    assert y.stride() == F.conv2d(x, torch.randn(8, x.shape[1], 3, 3), padding=2).stride()


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("branch_norm", [False, True])
@pytest.mark.parametrize("backend", ["reference", "native", "compiled", "without-onednn"])
def test_gradients_of_one_image_that_was_hwc(alpha: float, branch_norm: bool, backend: str) -> None:
    """ATen's own grouped convolution gets the gradient of a weight in channels_last wrong, by more than its size."""
    dtype = torch.float32 if backend == "without-onednn" else torch.float64
    image = torch.randn(8, 5, 16, dtype=dtype)
    name = backend if backend in ("reference", "native") else "native"
    layer = SPConv2d(16, 16, 3, padding=1, alpha=alpha, branch_norm=branch_norm, dtype=dtype, backend=name)
    call = torch.compile(layer, backend="aot_eager") if backend == "compiled" else layer
    inputs = (image.permute(2, 0, 1)[None], image.permute(2, 0, 1)[None].clone(memory_format=torch.contiguous_format))
    with torch.backends.mkldnn.flags(enabled=backend != "without-onednn"):
        gradients = [torch.autograd.grad(call(x).pow(3).sum(), list(layer.parameters())) for x in inputs]
    for of_hwc, of_nchw in zip(*gradients, strict=True):
        torch.testing.assert_close(of_hwc, of_nchw, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_pixel_keeps_its_format_as_of_conv2d(layout: torch.memory_format) -> None:
    x = torch.randn(3, 8, 1, 1).to(memory_format=layout)
    y = SPConv2d(8, 8, 3, padding=2, backend="native")(x)
    assert y.stride() == F.conv2d(x, torch.randn(8, 8, 3, 3), padding=2).stride()


@pytest.mark.parametrize("of_x", LAYOUTS, ids=str)
@pytest.mark.parametrize("of_weight", LAYOUTS, ids=str)
def test_redundant_branch_keeps_the_format_of_x1(of_x: torch.memory_format, of_weight: torch.memory_format) -> None:
    x1 = torch.randn(2, 4, 6, 5).contiguous(memory_format=of_x)
    weight = torch.randn(8, 4, 1, 1).to(memory_format=of_weight)
    u1 = functional.redundant_branch(x1, weight, kernel_size=3, padding=1)
    assert u1.is_contiguous(memory_format=of_x)


@pytest.mark.parametrize("channels", [16, 64])
@pytest.mark.parametrize("branch_norm", [False, True])
def test_gradients_have_the_strides_of_the_weights(channels: int, branch_norm: bool) -> None:
    """Of dimensions of size 1 too: DDP compares them, and warns that it may be slow."""
    layer = SPConv2d(channels, 2 * channels, 3, padding=1, branch_norm=branch_norm, backend="native")
    layer(torch.randn(4, channels, 7, 7).to(memory_format=torch.channels_last)).sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None
        assert p.grad.stride() == p.stride(), name
