"""The error budgets that other tests judge by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import SMALL, assert_agrees, make_inputs
from torch import Tensor

from spconv_triton import functional

CASE = next(case for case in SMALL if case.name == "odd-pixels")


def scaled(by: float) -> Any:
    """The layer, its output too large by so many roundings."""

    def layer(*args: Any, **kwargs: Any) -> Tensor:
        return functional.spconv2d(*args, **kwargs, backend="native") * (1 + by * torch.finfo(torch.float32).eps)

    return layer


def test_a_right_result_passes_and_a_wrong_one_does_not() -> None:
    for _ in range(20):
        assert_agrees(scaled(0), make_inputs(CASE))
    for roundings in (20.0, 1e3, float("nan")):
        with pytest.raises(AssertionError, match="y: "):
            assert_agrees(scaled(roundings), make_inputs(CASE))


def test_a_result_that_is_a_little_wrong_in_every_draw_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is beyond its budget in single draws by little, as luck may be, and over many draws it is so still."""
    monkeypatch.setattr("cases.LUCK", 100.0)
    with pytest.raises(AssertionError, match="geometric mean of 8 draws"):
        assert_agrees(scaled(20), make_inputs(CASE))
