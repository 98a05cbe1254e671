"""One layer called from many places at once: threads, streams, and the worker processes of a DataLoader."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from spconv_triton import SPConv2d, fuse
from spconv_triton.files import write_whole
from spconv_triton.fused import FusedSPConv2d

THREADS = 8


def at_once(calls: list[Callable[[], Tensor]]) -> list[Tensor]:
    """The results of all the calls, each started at the same moment in a thread of its own."""
    barrier = threading.Barrier(len(calls))

    def start(call: Callable[[], Tensor]) -> Tensor:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(start, calls))


@pytest.mark.parametrize("size", [(5, 4), (16, 12)], ids=("means-of-maps", "gate-first"))
@pytest.mark.parametrize("branch_norm", [False, True])
def test_threads_share_a_layer_in_eval(branch_norm: bool, size: tuple[int, int]) -> None:
    layer = SPConv2d(32, 24, 3, padding=1, branch_norm=branch_norm).eval()
    inputs = [torch.randn(1 + i % 3, 32, *size) for i in range(THREADS)]
    with torch.no_grad():
        expected = [layer(x) for x in inputs]

    def several(x: Tensor) -> Tensor:
        with torch.inference_mode():  # a thread of its own has modes of its own
            return torch.stack([layer(x) for _ in range(10)])

    for results, y in zip(at_once([lambda x=x: several(x) for x in inputs]), expected, strict=True):
        assert all(torch.equal(result, y) for result in results)


def test_threads_train_with_gradients_of_their_own() -> None:
    layer = SPConv2d(32, 24, 3, padding=1)
    inputs = [torch.randn(2, 32, 7, 9) for _ in range(THREADS)]
    parameters = list(layer.parameters())

    def gradients(x: Tensor) -> Tensor:
        flat = [g.flatten() for g in torch.autograd.grad(layer(x).square().sum(), parameters)]
        return torch.cat(flat)

    expected = [gradients(x) for x in inputs]
    for got, gradient in zip(at_once([lambda x=x: gradients(x) for x in inputs]), expected, strict=True):
        assert torch.equal(got, gradient)


def test_threads_accumulate_into_one_gradient() -> None:
    """As ``backward`` from several threads does; autograd adds under a lock, in any order."""
    layer = SPConv2d(16, 8, 3, padding=1, dtype=torch.float64)
    inputs = [torch.randn(2, 16, 6, 5, dtype=torch.float64) for _ in range(THREADS)]

    def backward(x: Tensor) -> Tensor:
        loss = layer(x).square().sum()
        loss.backward()
        return loss

    at_once([lambda x=x: backward(x) for x in inputs])
    together = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    for x in inputs:
        backward(x)
    for got, parameter in zip(together, layer.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = SPConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y if torch.is_grad_enabled() and self.training else y.relu() + x


def test_fuse_beside_threads_that_serve() -> None:
    """Neither a network that has nothing to do with it, nor the one that is being fused, notices; nor does fuse."""
    served = nn.Sequential(*(nn.Sequential(SPConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(4))).eval()
    others = [served, Block().eval(), nn.Linear(6, 6)]
    x, done, begun = torch.randn(1, 8, 6, 6), threading.Event(), threading.Barrier(len(others) + 1)
    with torch.no_grad():
        expected = [other(x) for other in others]

    def serve(other: nn.Module) -> list[Tensor]:
        begun.wait()
        results = []
        with torch.no_grad():
            while not done.is_set():
                results.append(other(x))
        return results

    with ThreadPoolExecutor(len(others)) as pool:
        serving = [pool.submit(serve, other) for other in others]
        begun.wait()
        try:
            fused = [fuse(served) for _ in range(20)]
        finally:
            done.set()
        for calls, y in zip(serving, expected, strict=True):
            assert all(torch.equal(result, y) for result in calls.result())
    for network in fused:
        assert sum(isinstance(part, FusedSPConv2d) for part in network.modules()) == 4


class Features(Dataset[Tensor]):
    """Images that a layer has seen: what a worker process computes."""

    def __init__(self, layer: nn.Module, images: Tensor) -> None:
        self.layer = layer
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.layer(self.images[index : index + 1])[0]


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_of_a_data_loader(start: str, workers: int) -> None:
    """Also after the layer has run, and so started its threads, in the process that forks."""
    layer = SPConv2d(16, 8, 3, padding=1).eval()
    data = Features(layer, torch.randn(6, 16, 12, 10))
    expected = torch.stack([data[i] for i in range(len(data))])
    loader = DataLoader(data, batch_size=2, num_workers=workers, multiprocessing_context=start, timeout=120)
    assert torch.equal(torch.cat(list(loader)), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams are a GPU's")
def test_streams() -> None:
    """A call runs on the current stream, like any of PyTorch's: whoever uses another waits for the tensors' own."""
    layer = SPConv2d(64, 64, 3, padding=1, device="cuda", dtype=torch.float16).eval()
    inputs = [torch.randn(8, 64, 28, 28, device="cuda", dtype=torch.float16) for _ in range(4)]
    with torch.no_grad():
        expected = [layer(x) for x in inputs]
        streams = [torch.cuda.Stream() for _ in inputs]
        results = []
        for stream, x in zip(streams, inputs, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)
                results.append(layer(x.clone()))
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
    for got, y in zip(results, expected, strict=True):
        assert torch.equal(got, y)


def test_threads_write_one_file(tmp_path: Path) -> None:
    """Whoever comes last, it is whole, and nobody fails for another's temporary file."""
    path = tmp_path / "checkpoint"

    def write(content: bytes) -> None:
        for _ in range(20):
            write_whole(path, content)

    contents = [bytes([i]) * 4096 for i in range(4)]
    with ThreadPoolExecutor(len(contents)) as pool:
        list(pool.map(write, contents))
    assert path.read_bytes() in contents
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]
