"""Float32 products follow PyTorch's own setting for convolutions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from spconv_triton.dispatch import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("needs triton", allow_module_level=True)

from spconv_triton.launch.common import dot_precision


@pytest.mark.parametrize(("setting", "expected"), [("tf32", "tf32"), ("ieee", "ieee")])
def test_float32_follows_the_setting(setting: str, expected: str) -> None:
    with fp32_precision(setting):
        assert dot_precision(torch.empty(1)) == expected
        for dtype in (torch.float16, torch.bfloat16):
            assert dot_precision(torch.empty(1, dtype=dtype)) == "ieee"


@pytest.mark.parametrize(("name", "expected"), [("gfx942:sramecc+", "tf32"), ("gfx90a", "ieee"), ("gfx950", "ieee")])
def test_of_amd_s_gpus_one_has_tf32(name: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton refuses it on the others."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    x = mock.Mock(dtype=torch.float32, device=torch.device("cuda"))
    with fp32_precision("tf32"):
        assert dot_precision(x) == expected


@contextlib.contextmanager
def fp32_precision(setting: str) -> Iterator[None]:
    """Of convolutions, by PyTorch's setting."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = setting
    try:
        yield
    finally:
        conv.fp32_precision = before
