"""A kernel that is launched again gets what Triton itself would give it: compared launch by launch, on a driver that
takes them and runs nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from spconv_triton.dispatch import HAS_TRITON, INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs compiled kernels: runs natively", allow_module_level=True)

import triton
from cases import Case
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.host import idle_gpu, through_triton
from spconv_triton import SPConv2d
from spconv_triton.functional import gap_softmax_fusion
from spconv_triton.launch import launching

CASES = (
    Case("descriptor", 2, 128, 128, (8, 8)),
    Case("descriptor, stride 2", 1, 128, 128, (8, 8), stride=(2, 2)),
    Case("flat", 3, 24, 40, (7, 5), groups=4),
    Case("branch", 2, 32, 32, (6, 6), alpha=1.0),
)


DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def described(argument: Any) -> Any:
    """What a kernel sees of an argument. Tensors that it writes are new ones each time, so of those what they are."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.shape, argument.stride(), argument.data_ptr() % 16
    if isinstance(argument, TensorDescriptor):
        return described(argument.base), argument.shape, argument.strides, argument.block_shape
    return argument


class Launches(list[Any]):
    """Compiled kernel, grid and arguments of each, and the arguments themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: list[list[Any]] = []

    def note(self, kernel: Any, grid: tuple[int, ...], arguments: list[Any]) -> None:
        self.append((kernel, grid, [described(argument) for argument in arguments]))
        self.arguments.append(arguments)

    def take(self) -> list[Any]:
        taken = list(self)
        self.clear()
        return taken


@pytest.fixture
def launches() -> Iterator[Launches]:
    found = Launches()
    with idle_gpu(found.note):
        yield found


def case_inputs(case: Case, dtype: torch.dtype, **layer: Any) -> tuple[SPConv2d, Tensor]:
    made = SPConv2d(
        case.in_channels, case.out_channels, case.kernel_size, alpha=case.alpha, dtype=dtype, backend="triton",
        **case.window, **layer,
    )  # fmt: skip
    x = torch.randn(case.batch, case.in_channels, *case.size, dtype=dtype)
    return made, x.contiguous(memory_format=torch.channels_last).requires_grad_()


def compare(call: Callable[[], Any], launches: Launches) -> list[Any]:
    """Launches of ``call`` through Triton, and that it makes the same ones when it is called for the third time."""
    call()  # it may be remembered from then on
    launches.clear()
    with through_triton():
        call()
        expected = launches.take()
    call()
    assert launches.take() == expected
    with mock.patch.object(triton.JITFunction, "run", side_effect=AssertionError("went through Triton again")):
        call()
    assert launches.take() == expected
    return expected


def step(layer: SPConv2d, x: Tensor) -> None:
    y = layer(x)
    torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launches_are_tritons(case: Case, dtype: torch.dtype, launches: Launches) -> None:
    layer, x = case_inputs(case, dtype)

    made = compare(lambda: step(layer, x), launches)
    assert len(made) == (4 if case.alpha == 1 else 7) + (case.stride != (1, 1))
    layer.eval()
    with torch.no_grad():
        assert compare(lambda: layer(x), launches) == made[: 1 if case.alpha == 1 else 3]


def test_launches_of_norms_and_of_the_fusion_are_tritons(launches: Launches) -> None:
    layer, x = case_inputs(CASES[0], torch.float16, branch_norm=True)

    assert len(compare(lambda: step(layer, x), launches)) > 7
    u3, u1 = torch.randn(2, 2, 32, 6, 6, requires_grad=True).unbind()

    def fuse() -> None:
        y = gap_softmax_fusion(u3, u1, backend="triton")
        torch.autograd.grad(y, (u3, u1), torch.ones_like(y))

    assert len(compare(fuse, launches)) == 4


def test_kernels_read_the_tensors_of_this_call(launches: Launches) -> None:
    layer, x = case_inputs(CASES[2], torch.float32)
    layer.eval()
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        others = [x.clone(), x * 2]
        for other in others:
            launches.arguments.clear()
            y = layer(other)
            assert launches.arguments[0][0].data_ptr() == other.data_ptr()
            assert launches.arguments[-1][8].data_ptr() == y.data_ptr()


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_another_size_is_another_kind(batch: int, launches: Launches) -> None:
    """Triton compiles anew for ints that are 1, or multiples of 16."""
    layer, x = case_inputs(CASES[2], torch.float16)
    layer.eval()
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        launches.clear()
        _, other = case_inputs(replace(CASES[2], batch=batch, size=(8, 16)), torch.float16)
        compare(lambda: layer(other), launches)


def test_unaligned_memory_is_another_kind(launches: Launches) -> None:
    layer, x = case_inputs(CASES[2], torch.float16)
    layer.eval()
    storage = torch.randn(x.numel() + 1, dtype=x.dtype)[1:]
    unaligned = storage.as_strided(x.shape, x.stride())
    with torch.no_grad():
        aligned = compare(lambda: layer(x), launches)
        assert compare(lambda: layer(unaligned), launches) != aligned


def test_kernels_of_one_kind_are_not_anothers(launches: Launches) -> None:
    """One after the other, and all of them remembered: dtypes, spacings of pixels that are multiples of 16 and are not,
    biases or none."""
    channels = CASES[0].in_channels
    layers = [case_inputs(CASES[0], dtype, bias=bias) for dtype in DTYPES for bias in (True, False)]
    for around in (0, 32, 2):
        for layer, x in layers:
            layer.eval()
            wide = torch.randn(2, channels + around, 8, 8, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                compare(lambda: layer(wide[:, :channels]), launches)  # noqa: B023, called at once


@pytest.mark.usefixtures("launches")
def test_kinds_are_not_kept_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "REMEMBERED", 4)
    layer, _ = case_inputs(CASES[2], torch.float16)
    layer.eval()
    with torch.no_grad():
        for width in range(3, 12):
            layer(torch.randn(1, CASES[2].in_channels, 3, width, dtype=torch.float16))
            assert 0 < len(launching._compiled) <= 4


def test_nothing_keeps_tensors(launches: Launches) -> None:
    layer, x = case_inputs(CASES[0], torch.float16)
    layer.eval()
    with torch.no_grad():
        for _ in range(2):
            layer(x)
    launches.arguments.clear()
    kept = weakref.ref(x)
    del x
    gc.collect()
    assert kept() is None


def test_what_a_kind_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_is_nvidia", lambda device: True)
    x, boxes = torch.zeros(64, 64), TensorDescriptor.from_tensor

    def kind(*args: Any, kernel: Any = launching.launch, **constants: Any) -> Any:
        return launching._kind(kernel, args, constants)

    kinds = [
        kind(x),
        kind(x.half()),
        kind(x.to("meta")),
        kind(x.flatten()[1:]),
        kind(x, 16),
        kind(x, 1),
        kind(x, A=1),
        kind(x, A=2),
        kind(x, B=1),
        kind(x, kernel=kind),
        kind(boxes(x, [32, 32])),
        kind(boxes(x, [16, 32])),
        kind(boxes(x.half(), [32, 32])),
        kind(boxes(x.bfloat16(), [32, 32])),
    ]
    assert len(set(kinds)) == len(kinds)
    assert kind(x) == kind(x + 1)
