"""These tests run kernels: on a GPU, or on a CPU under TRITON_INTERPRET=1."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from spconv_triton.dispatch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"

if INTERPRETED:
    from quick_interpreter import overflow_checks, quicken

    quicken()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETED or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="kernels run on a GPU or under TRITON_INTERPRET=1")
    for item in items:
        if "kernels" in item.path.parts:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def float32_as_such() -> Iterator[None]:
    """A GPU's convolutions multiply float32 as TF32 by default, ours too, but cuDNN not all of them: no yardstick."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    if not INTERPRETED:
        conv.fp32_precision = "ieee"
    yield
    conv.fp32_precision = before


@pytest.fixture
def overflow_checked() -> Iterator[None]:
    """In the interpreter sums and products of integers that overflow are errors: for tests with large offsets."""
    with overflow_checks() if INTERPRETED else contextlib.nullcontext():
        yield


@pytest.fixture
def device() -> str:
    return DEVICE
