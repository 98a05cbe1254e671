"""What the layer keeps for its backward, and that nothing of the size of an output is among it."""

from __future__ import annotations

import pytest
import torch
from cases import Case, kept_bytes, make_inputs

from spconv_triton import functional


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "limit"), [(14, 1.05), (7, 1.25)])
def test_kept_for_backward(size: int, limit: float, dtype: torch.dtype, device: str) -> None:
    case = Case("memory", 2, 32, 32, (size, size))
    inputs = make_inputs(case, dtype, device=device)
    kept = kept_bytes(lambda: functional.spconv2d(*inputs.positional(), **inputs.window, backend="triton"))
    weights = [inputs.weight_gwc, inputs.weight_pwc, inputs.weight_redundant]
    of_x = inputs.x.numel() * inputs.x.itemsize
    allowed = limit * of_x + sum(w.numel() * w.itemsize for w in weights)
    assert of_x < kept <= allowed
