"""No weight is ever stale on ATen, eager or compiled."""

from __future__ import annotations

import pytest
import torch
from weight_updates import UPDATES, Update, assert_follows

from spconv_triton import SPConv2d


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.__name__)
def test_eager(update: Update) -> None:
    layer = SPConv2d(8, 8, 3, padding=1, backend="native")
    assert_follows(layer, torch.randn(2, 8, 6, 5), update, layer)


@pytest.mark.parametrize("update", UPDATES[:3], ids=lambda update: update.__name__)
def test_compiled(update: Update) -> None:
    layer = SPConv2d(8, 8, 3, padding=1, backend="native")
    torch._dynamo.reset()
    assert_follows(layer, torch.randn(2, 8, 6, 5), update, torch.compile(layer, backend="aot_eager", fullgraph=True))
