"""The reference, which judges every other path, judged itself: by loops, by its authors' graph and by identities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import SMALL, Case, Inputs, assert_within_budget, make_inputs, run
from published import PublishedSPConv
from torch import Tensor

from spconv_triton import SPConv2d, functional, reference

EXACT = torch.float64


def by_definition(
    x: np.ndarray,
    weight_gwc: np.ndarray,
    weight_pwc: np.ndarray,
    weight_redundant: np.ndarray | None,
    bias: np.ndarray | None,
    branch_bias: np.ndarray | None,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> np.ndarray:
    """The equations, one output pixel and one sample at a time, in float64."""
    outputs, per_group, kh, kw = weight_gwc.shape
    representative = per_group * groups
    samples, _, height, width = x.shape
    out_height = (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_width = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    y = np.empty((samples, outputs, out_height, out_width))
    for n in range(samples):
        u3 = np.zeros((outputs, out_height, out_width))
        u1 = np.zeros((outputs, out_height, out_width))
        for i in range(out_height):
            for j in range(out_width):
                for g in range(groups):
                    rows_out = slice(g * outputs // groups, (g + 1) * outputs // groups)
                    channels = slice(g * per_group, (g + 1) * per_group)
                    for a in range(kh):
                        for b in range(kw):
                            r = i * stride[0] + a * dilation[0] - padding[0]
                            c = j * stride[1] + b * dilation[1] - padding[1]
                            if 0 <= r < height and 0 <= c < width:
                                u3[rows_out, i, j] += weight_gwc[rows_out, :, a, b] @ x[n, channels, r, c]
                # The centre tap; at a stride, the average over the valid pixels of the window that starts there.
                first_row = i * stride[0] + dilation[0] * (kh - 1) // 2 - padding[0]
                first_column = j * stride[1] + dilation[1] * (kw - 1) // 2 - padding[1]
                seen = [
                    x[n, :, r, c]
                    for r in range(first_row, first_row + stride[0])
                    for c in range(first_column, first_column + stride[1])
                    if 0 <= r < height and 0 <= c < width
                ]
                centre = sum(seen) / len(seen) if seen else np.zeros(x.shape[1])
                u3[:, i, j] += weight_pwc[:, :, 0, 0] @ centre[:representative]
                if weight_redundant is not None:
                    u1[:, i, j] += weight_redundant[:, :, 0, 0] @ centre[representative:]
        if branch_bias is not None:
            u3 += branch_bias[0, :, None, None]
            u1 += branch_bias[1, :, None, None]
        for m in range(outputs):
            beta = 1.0
            if weight_redundant is not None:
                s3, s1 = u3[m].mean(), u1[m].mean()
                top = max(s3, s1)
                beta = np.exp(s3 - top) / (np.exp(s3 - top) + np.exp(s1 - top))
            y[n, m] = beta * u3[m] + (1 - beta) * u1[m]
            if bias is not None:
                y[n, m] += bias[m]
    return y


def assert_as_defined(inputs: Inputs) -> None:
    arrays = [None if t is None else t.detach().numpy() for t in (*inputs.positional(), inputs.branch_bias)]
    expected = torch.from_numpy(by_definition(*arrays, **inputs.window))
    got = run(reference.spconv2d, inputs)["y"]
    assert_within_budget("y", got, expected, expected)


@pytest.mark.parametrize("bias", [False, True], ids=["bare", "biased"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_cases_by_definition(case: Case, bias: bool) -> None:
    assert_as_defined(make_inputs(case, bias=bias, branch_bias=bias).to(EXACT))


def pick(low: int, high: int) -> int:
    """A random int, both ends included, from the generator that the seed of the session feeds."""
    return int(torch.randint(low, high + 1, ()))


def random_case() -> Case:
    """Any legal geometry, most of them not centred; small enough for loops."""
    groups = pick(1, 3)
    representative, redundant = groups * pick(1, 3), pick(0, 4)
    kernel_size = (1 + 2 * pick(0, 2), 1 + 2 * pick(0, 2))
    stride, padding, dilation = [(pick(low, high), pick(low, high)) for low, high in ((1, 4), (0, 5), (1, 3))]
    height, width = (
        max(1, d * (k - 1) + 1 - 2 * p) + pick(0, 4) for k, p, d in zip(kernel_size, padding, dilation, strict=True)
    )
    channels = representative + redundant
    # Half a channel more, so that the division cannot round alpha L down.
    alpha = min(1.0, (representative + 0.5) / channels) if redundant else 1.0
    return Case(
        "random",
        pick(1, 2),
        channels,
        groups * pick(1, 2),
        (height, width),
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        alpha,
    )


@pytest.mark.parametrize("trial", range(60))
def test_random_geometries_by_definition(trial: int) -> None:
    case = random_case()
    print(case, vars(case))
    inputs = make_inputs(case, bias=trial % 2 == 0, branch_bias=trial % 3 == 0).to(EXACT)
    assert inputs.weight_pwc.shape[1] == case.representative
    assert_as_defined(inputs)


def test_a_window_wholly_outside_counts_as_zero() -> None:
    """Padding beyond half the window: the first centre taps lie in it, and only the biases are left of them."""
    window: dict[str, Any] = {"stride": (2, 2), "padding": (4, 4), "dilation": (1, 1), "groups": 1}
    x, ones = torch.ones(1, 2, 2, 2, dtype=EXACT), torch.ones(1, 1, 1, 1, dtype=EXACT)
    got = reference.spconv2d(x, ones.expand(1, 1, 3, 3), ones, ones, **window)
    centre = reference.pointwise_input(x, (3, 3), (4, 4), stride=2, padding=4, dilation=1)
    # Windows start at -3, -1, 1 and 3 of 0..1: none, one, one and no valid pixel.
    assert torch.equal(
        centre[0, 0], torch.tensor([0.0, 1, 1, 0], dtype=EXACT).outer(torch.tensor([0.0, 1, 1, 0]).double())
    )
    assert got.shape == (1, 1, 4, 4)
    assert got[0, 0, 0, 0] == 0


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients(case: Case) -> None:
    inputs = make_inputs(case, branch_bias=True).to(EXACT)
    names = list(inputs.tensors())

    def layer(*leaves: Tensor) -> Tensor:
        given = dict(zip(names, leaves, strict=True))
        return reference.spconv2d(
            given.pop("x"),
            given.pop("weight_gwc"),
            given.pop("weight_pwc"),
            given.pop("weight_redundant", None),
            **given,
            **inputs.window,
        )

    # A random projection of the Jacobian; the test below goes through all of a small one, undefined gradients too.
    leaves = tuple(inputs.tensors().values())
    assert torch.autograd.gradcheck(layer, leaves, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("stride", [1, 2])
def test_whole_jacobian(stride: int) -> None:
    case = Case("tiny", 2, 6, 4, (3, 4), stride=(stride, stride), alpha=2 / 3)
    inputs = make_inputs(case, gate=0.5).to(EXACT)

    def layer(x: Tensor, gwc: Tensor, pwc: Tensor, redundant: Tensor, bias: Tensor, branch_bias: Tensor) -> Tensor:
        return reference.spconv2d(x, gwc, pwc, redundant, bias, branch_bias=branch_bias, **inputs.window)

    assert torch.autograd.gradcheck(layer, tuple(inputs.tensors().values()))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_agrees_with_the_published_layer(stride: int, ratio: float) -> None:
    """Even sizes, where the published layer works; the bias of its 1 x 1 convolution enters the gate."""
    published = PublishedSPConv(16, 12, stride, ratio, norm=False).double()
    x = torch.randn(3, 16, 8, 6, dtype=EXACT)
    expected = published(x)
    branch_bias = torch.stack([torch.zeros(12, dtype=EXACT), published.conv1x1.bias])
    got = reference.spconv2d(
        x,
        published.gwc.weight,
        published.pwc.weight,
        published.conv1x1.weight,
        branch_bias=branch_bias,
        stride=stride,
        padding=1,
        groups=2,
    )
    assert_within_budget("y", got, expected, expected)


def test_everything_representative_is_two_convolutions() -> None:
    """alpha = 1: no gate."""
    inputs = make_inputs(Case("all", 2, 8, 6, (5, 4), alpha=1.0)).to(EXACT)
    expected = (
        F.conv2d(inputs.x, inputs.weight_gwc, padding=1, groups=2)
        + F.conv2d(inputs.x, inputs.weight_pwc)
        + inputs.bias[:, None, None]
    )
    assert torch.equal(run(reference.spconv2d, inputs)["y"], expected)


@pytest.mark.parametrize("size", [(8, 6), (2, 2), (4, 10)])
def test_stride_2_reads_2x2_averages_of_even_sizes(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=EXACT)
    output = (size[0] // 2, size[1] // 2)
    assert torch.equal(
        reference.pointwise_input(x, (3, 3), output, stride=2, padding=1, dilation=1), F.avg_pool2d(x, 2)
    )


def test_stride_2_averages_what_there_is_of_odd_sizes() -> None:
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 10]], dtype=EXACT)[None, None]
    got = reference.pointwise_input(x, (3, 3), (2, 2), stride=2, padding=1, dilation=1)
    assert torch.equal(got[0, 0], torch.tensor([[3, 4.5], [7.5, 10]], dtype=EXACT))


@pytest.mark.parametrize("size", [(7, 7), (9, 5), (1, 3), (8, 7)])
def test_output_is_the_size_of_a_dense_convolution(size: tuple[int, int]) -> None:
    inputs = make_inputs(Case("odd", 2, 8, 6, size, stride=(2, 2)))
    dense = F.conv2d(inputs.x, torch.ones(6, 8, 3, 3), stride=2, padding=1)
    assert run(reference.spconv2d, inputs)["y"].shape == dense.shape


FUSIONS = {"reference": reference.gap_softmax_fusion, "native": functional.gap_softmax_fusion}


@pytest.fixture(params=list(FUSIONS))
def fusion(request: pytest.FixtureRequest) -> Any:
    return FUSIONS[request.param]


def branches() -> tuple[Tensor, Tensor]:
    u3, u1 = torch.randn(2, 3, 5, 4, 3, dtype=EXACT)
    return u3, u1 + torch.randn(3, 5, 1, 1, dtype=EXACT)


def test_gates_sum_to_one(fusion: Any) -> None:
    """The fusion of a map with itself is that map, and of maps that differ by a constant lies between them."""
    u3, u1 = branches()
    assert_within_budget("y", fusion(u3, u3.clone()), u3, u3)
    swapped = fusion(u1, u3)
    assert_within_budget("swapped", fusion(u3, u1), swapped, swapped)
    between = u3 + torch.sigmoid(torch.ones_like(u3))
    assert_within_budget("between", fusion(u3, u3 + 1), between, between)


def test_softmax_of_two_is_a_sigmoid(fusion: Any) -> None:
    u3, u1 = branches()
    beta = torch.sigmoid(u3.mean((2, 3), keepdim=True) - u1.mean((2, 3), keepdim=True))
    expected = beta * u3 + (1 - beta) * u1
    assert_within_budget("y", fusion(u3, u1), expected, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_saturated_gate_passes_one_branch(fusion: Any, dtype: torch.dtype) -> None:
    u3, u1 = (u.to(dtype) for u in branches())
    assert torch.equal(fusion(u3 + 3e4, u1), u3 + 3e4)
    assert torch.equal(fusion(u3, u1 + 3e4), u1 + 3e4)


def test_statistics_are_not_kept_in_half_precision() -> None:
    """Pixels that sum past float16's largest number, 65504."""
    u3 = torch.full((1, 1, 64, 64), 64.0, dtype=torch.float16)
    u1 = u3 - 0.5
    beta = torch.sigmoid(torch.tensor(0.5))
    expected = (beta * u3.float() + (1 - beta) * u1.float()).half()
    assert torch.equal(reference.gap_softmax_fusion(u3, u1), expected)
    assert torch.equal(functional.gap_softmax_fusion(u3, u1), expected)


@pytest.mark.parametrize(
    ("alpha", "groups", "k", "per_channel_pair"),
    [(0.5, 2, 3, 3.25), (0.25, 2, 3, 2.125), (0.5, 4, 3, 2.125), (1.0, 2, 3, 5.5), (0.5, 2, 5, 7.25), (0.5, 1, 1, 1.5)],
)
def test_parameter_count(alpha: float, groups: int, k: int, per_channel_pair: float) -> None:
    """k^2 alpha L M / G + alpha L M + (1 - alpha) L M; at the defaults 3.25 L M."""
    layer = SPConv2d(64, 32, k, groups=groups, bias=False, alpha=alpha)
    assert sum(p.numel() for p in layer.parameters()) == per_channel_pair * 64 * 32
