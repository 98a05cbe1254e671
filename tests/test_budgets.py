"""The checks that every other test relies on notice what they are there to notice."""

from __future__ import annotations

import pytest
import torch
from cases import (
    SMALL,
    Inputs,
    assert_agrees_over_draws,
    assert_within_budget,
    assert_within_budget_over_draws,
    kept_bytes,
    make_inputs,
)
from torch import Tensor

from spconv_triton import kept, reference

EXACT = torch.ones(4, dtype=torch.float64)
EPS = torch.finfo(torch.float32).eps

PLAIN = next(case for case in SMALL if case.name == "plain")


def wrong_by(roundings: float) -> Tensor:
    return (EXACT + roundings * EPS).float()


def draw(roundings: float) -> tuple[dict[str, Tensor], ...]:
    """A result so many roundings off; the reference errs by one, and the budget is four."""
    return {"y": wrong_by(roundings)}, {"y": wrong_by(1)}, {"y": EXACT}


def test_a_single_result_is_within_budget_or_not() -> None:
    assert_within_budget("y", wrong_by(4), wrong_by(1), EXACT)
    with pytest.raises(AssertionError, match=r"error 5.96.* allowed 4.76"):
        assert_within_budget("y", wrong_by(5), wrong_by(1), EXACT)


def test_nothing_is_judged_by_itself() -> None:
    got = wrong_by(100)
    with pytest.raises(AssertionError, match="y: judged by itself"):
        assert_within_budget("y", got, got, EXACT)
    with pytest.raises(AssertionError, match="y: judged by itself"):
        assert_within_budget_over_draws([({"y": got}, {"y": got}, {"y": EXACT})])


def test_every_draw_is_judged() -> None:
    with pytest.raises(AssertionError, match="no draws"):
        assert_within_budget_over_draws([])
    with pytest.raises(ValueError, match="shorter"):
        assert_within_budget_over_draws(map(draw, (1, 100)), sensitivities=[{}])


def test_what_is_kept_is_counted_whole_though_memory_is_used_again() -> None:
    """Of two maps, the second may lie where the first lay, once that is let go; parameters do not count."""
    weight = torch.ones(1000, requires_grad=True)

    def forward() -> Tensor:
        for _ in range(8):
            y = weight.exp().sum()
        return y * weight.sum()

    for count in (kept_bytes, kept.kept_bytes):
        assert count(forward) - count(forward, [weight]) == 0  # exp keeps its result
        assert 8 * 4000 <= count(forward) <= 8 * 4000 + 8
        assert count(lambda: weight.square().sum()) == 4000
        assert count(lambda: weight.square().sum(), [weight]) == 0


def test_luck_evens_out_over_draws() -> None:
    assert_within_budget_over_draws(map(draw, (6, 2, 1)))
    with pytest.raises(AssertionError, match=r"1\.25 x the allowed error, as the geometric mean of 3 draws"):
        assert_within_budget_over_draws(map(draw, (5, 5, 5)))


def test_one_wrong_draw_is_not_luck() -> None:
    with pytest.raises(AssertionError, match=r"25\.0 x the allowed error in one of 8 draws"):
        assert_within_budget_over_draws(map(draw, (100, *[1] * 7)))


def test_what_a_draw_is_sensitive_to_is_allowed_in_that_draw() -> None:
    moves = [{"y": 3 * EPS}, {"y": 0.0}]
    assert_within_budget_over_draws(map(draw, (10, 4)), sensitivities=moves)
    with pytest.raises(AssertionError, match="x the allowed error"):
        assert_within_budget_over_draws(map(draw, (10, 4)))


@pytest.mark.parametrize("gradient", [False, True])
def test_an_error_of_some_roundings_is_noticed(gradient: bool) -> None:
    """In the output or in a gradient alone, with and without an allowance for the inputs' roundings."""

    def nudged(*arguments: Tensor | None, **options: object) -> Tensor:
        y = reference.spconv2d(*arguments, **options)
        if not gradient:
            return y * (1 + 100 * EPS)
        y.register_hook(lambda grad: grad * (1 + 100 * EPS))
        return y

    for perturbations in (0, 4):
        with pytest.raises(AssertionError, match="x the allowed error"):
            assert_agrees_over_draws(nudged, lambda: make_inputs(PLAIN), 4, perturbations=perturbations)


@pytest.mark.parametrize("put_back", [False, True])
def test_inputs_that_are_written_to_are_noticed(put_back: bool) -> None:
    def writes(x: Tensor, *rest: Tensor | None, **options: object) -> Tensor:
        with torch.no_grad():
            x.add_(1)
            if put_back:
                x.sub_(1)
        return reference.spconv2d(x, *rest, **options)

    # Whole numbers, which come back as they were.
    def whole() -> Inputs:
        inputs = make_inputs(PLAIN)
        with torch.no_grad():
            inputs.x.round_()
        return inputs

    with pytest.raises(AssertionError, match="x was written to, and put back" if put_back else "x was written to$"):
        assert_agrees_over_draws(writes, whole, 1)


def test_what_is_not_finite_is_never_within_budget() -> None:
    for value in (float("nan"), float("inf")):
        got = wrong_by(0)
        got[2] = value
        with pytest.raises(AssertionError, match="1 of 4 elements are not finite"):
            assert_within_budget_over_draws([draw(1), ({"y": got}, {"y": wrong_by(1)}, {"y": EXACT})])
