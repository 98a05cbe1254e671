"""No weight is ever stale on the kernels: they read weights as stored, and packing happens in the same call."""

from __future__ import annotations

import pytest
import torch
from weight_updates import UPDATES, Update, assert_follows, in_place, optimizer_step

from spconv_triton import SPConv2d


def make_layer(device: str) -> SPConv2d:
    return SPConv2d(8, 8, 3, padding=1, backend="triton", device=device)


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.__name__)
def test_eager(update: Update, device: str) -> None:
    layer = make_layer(device)
    assert_follows(layer, torch.randn(2, 8, 6, 5, device=device), update, layer)


@pytest.mark.parametrize("update", [in_place, optimizer_step], ids=lambda update: update.__name__)
def test_compiled(update: Update, device: str) -> None:
    layer = make_layer(device)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_follows(layer, torch.randn(2, 8, 6, 5, device=device), update, compiled)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("update", [in_place, optimizer_step], ids=lambda update: update.__name__)
def test_cuda_graph(update: Update) -> None:
    layer = make_layer("cuda")
    x = torch.randn(2, 8, 6, 5, device="cuda")
    with torch.inference_mode():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)

    def replay(_: torch.Tensor) -> torch.Tensor:
        graph.replay()
        return y.clone()

    assert_follows(layer, x, update, replay)
