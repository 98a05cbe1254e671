"""Point-wise weights inside group-wise ones, against the two convolutions that they stand for, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import SMALL, Case, make_inputs
from torch import Tensor

from spconv_triton import reference
from spconv_triton.geometry import Geometry
from spconv_triton.native import branches
from spconv_triton.native.folding import can_fold, fold, merge, other_blocks, own_blocks, part_gradient, reads_the_same

FITTING = [case for case in SMALL if reads_the_same(case.geometry, *case.size)]
FOLDABLE = [case for case in FITTING if case.groups <= 2]


def test_which_layers_fit() -> None:
    others = {case.name for case in SMALL if case not in FITTING}
    assert others == {"stride-2-odd", "stride-3-shifted", "tiny-stride-2"}
    assert {case.name for case in FITTING if case not in FOLDABLE} == {"narrow-groups"}


@pytest.mark.parametrize(
    ("window", "size", "fits"),
    [
        ({"stride": (2, 2), "padding": (1, 1)}, (8, 6), True),
        ({"stride": (2, 1), "padding": (1, 1)}, (8, 5), True),
        ({"stride": (2, 2), "padding": (1, 1)}, (8, 5), False),
        ({"stride": (2, 2), "padding": (1, 1), "dilation": (1, 2)}, (8, 6), False),
        ({"stride": (3, 3), "padding": (1, 1)}, (9, 9), False),
        ({"stride": (3, 3), "padding": (2, 2), "kernel_size": (5, 5)}, (9, 9), True),
        ({"stride": (2, 2), "padding": (0, 0), "kernel_size": (1, 1)}, (8, 8), False),
        ({"padding": (2, 2), "dilation": (2, 2)}, (5, 7), True),
        ({"padding": (0, 0)}, (8, 8), True),
        ({"padding": (0, 2)}, (5, 4), True),
        ({"stride": (2, 2), "padding": (0, 0)}, (7, 9), True),
        ({"stride": (2, 2), "padding": (0, 0)}, (8, 8), True),
        ({"stride": (2, 2), "padding": (2, 1)}, (8, 8), False),
    ],
    ids=str,
)
def test_taps_read_the_same_only_where_windows_are_whole(window: dict, size: tuple[int, int], fits: bool) -> None:
    defaults = {"kernel_size": (3, 3), "stride": (1, 1), "dilation": (1, 1), "groups": 2}
    geometry = Geometry(**{**defaults, **window})
    assert reads_the_same(geometry, *size) == fits
    if fits:
        case = Case("window", 2, 8, 6, size, **{k: v for k, v in {**defaults, **window}.items() if k != "groups"})
        assert_stands_for_both(case, merged=True)
        assert_stands_for_both(case, merged=False)


def branch(x3: Tensor, gwc: Tensor, pwc: Tensor, geometry: Geometry) -> Tensor:
    """U3 by the reference."""
    return reference.representative_branch(
        x3,
        gwc,
        pwc,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
    )


def by_one_weight(x3: Tensor, gwc: Tensor, pwc: Tensor, geometry: Geometry, *, merged: bool) -> Tensor:
    """U3 by the merged weight, or by the folded one and what is left."""
    if merged:
        return F.conv2d(x3, merge(gwc, pwc, geometry), None, *geometry[1:4], 1)
    u3 = F.conv2d(x3, fold(gwc, pwc, geometry), None, *geometry[1:])
    z3 = branches.pointwise_input(x3, geometry)
    for block in other_blocks(gwc, geometry.groups):
        read = z3[:, block.input : block.input + block.inputs]
        added = F.conv2d(read, block.of(pwc)[:, :, None, None])
        u3 = u3 + F.pad(added, (0, 0, 0, 0, block.output, u3.shape[1] - block.output - block.outputs))
    return u3


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    inputs = make_inputs(case, torch.float64)
    return tuple(t.detach() for t in (inputs.x[:, : case.representative], inputs.weight_gwc, inputs.weight_pwc))  # type: ignore[return-value]


def assert_stands_for_both(case: Case, *, merged: bool) -> None:
    x3, gwc, pwc = operands(case)
    before = gwc.clone(), pwc.clone()
    got = by_one_weight(x3, gwc, pwc, case.geometry, merged=merged)
    torch.testing.assert_close(got, branch(x3, gwc, pwc, case.geometry), rtol=1e-12, atol=1e-12)
    assert torch.equal(gwc, before[0]), "weight_gwc was written to"
    assert torch.equal(pwc, before[1]), "weight_pwc was written to"


@pytest.mark.parametrize("case", FITTING, ids=str)
def test_merged_weights(case: Case) -> None:
    assert_stands_for_both(case, merged=True)


@pytest.mark.parametrize("case", FOLDABLE, ids=str)
def test_folded_weights(case: Case) -> None:
    assert_stands_for_both(case, merged=False)


@pytest.mark.parametrize("case", FITTING, ids=str)
def test_gradients_of_both_weights_are_in_that_of_the_merged_one(case: Case) -> None:
    """As autograd has them of :func:`merge`."""
    geometry = case.geometry
    weights = [weight.requires_grad_() for weight in operands(case)[1:]]
    merged = merge(*weights, geometry)
    assert merged.is_contiguous(memory_format=torch.channels_last)
    gradient = torch.randn_like(merged)
    torch.testing.assert_close(part_gradient(gradient, geometry), torch.autograd.grad(merged, weights, gradient))


@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_cover_the_weight_once(groups: int) -> None:
    gwc, pwc = torch.zeros(6, 4, 3, 3), torch.zeros(6, 4 * groups, 1, 1)
    for block in (*own_blocks(gwc, groups), *other_blocks(gwc, groups)):
        block.of(pwc).add_(1)
    assert (pwc == 1).all()


@pytest.mark.parametrize("groups", [3, 4, 5])
def test_more_groups_than_two_are_not_folded(groups: int) -> None:
    assert not can_fold(Geometry((3, 3), (1, 1), (1, 1), (1, 1), groups), 8, 8)
