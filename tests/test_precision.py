"""Float32 products follow PyTorch's own setting for convolutions."""

from __future__ import annotations

import pytest
import torch

from spconv_triton.dispatch import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("needs triton", allow_module_level=True)

from spconv_triton.launch.common import dot_precision


@pytest.mark.parametrize(("setting", "expected"), [("tf32", "tf32"), ("ieee", "ieee")])
def test_float32_follows_the_setting(setting: str, expected: str) -> None:
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        conv.fp32_precision = setting
        assert dot_precision(torch.float32) == expected
        assert dot_precision(torch.float16) == dot_precision(torch.bfloat16) == "ieee"
    finally:
        conv.fp32_precision = before
