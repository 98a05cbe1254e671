"""The layer over tensor-map descriptors against float64; tests force the path, which else is a GPU's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, Inputs, assert_within_budget, make_inputs, run
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled

from spconv_triton import dispatch, functional, launch, reference
from spconv_triton.dispatch import INTERPRETED
from spconv_triton.launch import common, descriptor
from spconv_triton.launch.descriptor import Tile

pytestmark = pytest.mark.usefixtures("poisoned_empty")

PLAIN = Case("plain", 2, 64, 64, (5, 6), groups=1)
CASES = (
    PLAIN,
    Case("merged", 33, 64, 64, (2, 1)),  # more samples than a block of the gate kernel: they share the packing
    Case("two-groups", 2, 64, 128, (3, 5)),
    Case("four-groups-merged-by-two", 1, 64, 128, (4, 3), groups=4),
    Case("alpha-1/4", 2, 64, 64, (3, 3), alpha=1 / 4),
    Case("alpha-3/4", 2, 64, 64, (2, 5), alpha=3 / 4),
    Case("one-pixel", 2, 64, 64, (1, 1)),
    Case("stride-2", 2, 64, 64, (6, 8), stride=(2, 2)),
    Case("stride-2-groups", 1, 64, 128, (4, 2), stride=(2, 2)),
)

# Every kind of box, and what is left over at the edges of images and batch: BLOCK_N, BLOCK_H, BLOCK_W, pixels' case.
BOXES = (
    (1, 8, 8, PLAIN),
    (1, 8, 16, replace(PLAIN, size=(9, 17), batch=1)),
    (4, 4, 4, replace(PLAIN, batch=5)),
    (16, 2, 2, replace(PLAIN, batch=3, size=(3, 3))),
    (32, 1, 2, replace(PLAIN, batch=35, size=(1, 3))),
    (1, 8, 8, replace(PLAIN, size=(6, 18), stride=(2, 2))),
    (16, 2, 2, replace(PLAIN, batch=3, size=(6, 6), stride=(2, 2))),
)


def eager_packing(inputs: Inputs, case: Case) -> Tensor:
    """The packed weight by its definition, channel by channel of the output."""
    plan = descriptor.packing(case.in_channels, case.representative, case.out_channels, case.groups)
    assert plan is not None
    stride = case.stride[0]
    gwc, pwc, redundant = (w.detach().float() for w in (inputs.weight_gwc, inputs.weight_pwc, inputs.weight_redundant))
    per_group, outputs = gwc.shape[1], case.out_channels // case.groups
    share = 1 / stride**2
    rows = []
    for m in range(case.out_channels):
        group = m // outputs
        first = group // plan.merge * plan.per_tap
        merged = range(first, first + plan.per_tap)
        taps = torch.zeros(3, 3, case.representative)
        taps[:, :, group * per_group : (group + 1) * per_group] = gwc[m].permute(1, 2, 0).cpu()
        taps[1 : 1 + stride, 1 : 1 + stride, merged] += pwc[m, merged, 0, 0].cpu() * share
        behind = [(first + plan.per_tap + i) % case.representative for i in range(case.representative - plan.per_tap)]
        pointwise = pwc[m, behind, 0, 0].cpu() * share
        rows.append(torch.cat([pointwise, taps[:, :, merged].flatten(), redundant[m, :, 0, 0].cpu() * share]))
    return torch.stack(rows).to(gwc.device, inputs.x.dtype)


def layer(inputs: Inputs, case: Case, path: str = "descriptor", **options: Any) -> tuple[Tensor, ...]:
    tensors = (inputs.x, inputs.weight_gwc, inputs.weight_pwc, inputs.weight_redundant, inputs.bias, inputs.branch_bias)
    with torch.no_grad(), set_wrap_triton_enabled(False):
        return launch.spconv2d(*tensors, case.geometry, path=path, **options)


def check(inputs: Inputs, case: Case, *, condition: float = 1.0) -> Tensor:
    y = layer(inputs, case)[0]
    same_dtype = run(reference.spconv2d, inputs)["y"]
    exact = run(reference.spconv2d, inputs.to(torch.float64))["y"]
    assert_within_budget("y", y, same_dtype, exact, condition=condition)
    assert y.is_contiguous(memory_format=torch.channels_last)
    return y


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64_and_packs_as_defined(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(case, torch.float16, device=device, branch_bias=True)
    packed: list[Tensor] = []
    convolve = descriptor.convolve
    monkeypatch.setattr(descriptor, "convolve", lambda x, w, *rest: packed.append(w) or convolve(x, w, *rest))
    check(inputs, case)
    assert torch.equal(packed[0], eager_packing(inputs, case))


def test_bfloat16(device: str) -> None:
    check(make_inputs(CASES[1], torch.bfloat16, device=device, bias=False), CASES[1])


@pytest.mark.parametrize("gate", [-500.0, -50.0, 50.0, 500.0])
def test_saturated_gate(gate: float, device: str) -> None:
    check(make_inputs(PLAIN, torch.float16, device=device, gate=gate), PLAIN)


def test_what_the_backward_keeps_is_the_other_path_s(device: str) -> None:
    inputs = make_inputs(CASES[1], torch.float16, device=device)
    for got, expected in zip(layer(inputs, CASES[1])[1:], layer(inputs, CASES[1], "flat")[1:], strict=True):
        assert torch.equal(got, expected)


def mixed(inputs: Inputs, case: Case, ratio: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """scale (U3 + ratio U1) + offset."""
    x3, x1 = inputs.x.detach().split((case.representative, case.in_channels - case.representative), dim=1)
    u3 = reference.representative_branch(x3, inputs.weight_gwc, inputs.weight_pwc, **case.window)
    u1 = functional.redundant_branch(x1, inputs.weight_redundant, kernel_size=3, stride=case.stride, padding=1)
    ratio, scale, offset = (plane.to(u3.dtype)[:, :, None, None] for plane in (ratio, scale, offset))
    return (scale * (u3 + ratio * u1) + offset).detach()


@pytest.mark.parametrize("dtype", descriptor.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("block_n", "block_h", "block_w", "case"), BOXES, ids=lambda value: str(getattr(value, "size", value))
)
def test_every_box(
    block_n: int,
    block_h: int,
    block_w: int,
    case: Case,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The convolution alone: planes at random, weights packed eagerly, and memory behind the output untouched."""
    tile = Tile(block_n, block_h, block_w, 64, 32, 4, 4)
    monkeypatch.setattr(descriptor, "best_tile", lambda *args: tile)
    inputs = make_inputs(case, dtype, device=device)
    ratio, scale, offset = torch.randn(3, case.batch, case.out_channels, device=device).exp()
    height, width = case.output_size()
    guard = case.out_channels * width
    memory = torch.full((case.batch * case.out_channels * height * width + 2 * guard,), 7.0, dtype=dtype, device=device)
    y = memory[guard:-guard].view(case.batch, height, width, case.out_channels).permute(0, 3, 1, 2).fill_(float("nan"))
    monkeypatch.setattr(descriptor, "empty_channels_last", lambda *args: y)
    packed = eager_packing(inputs, case)
    window = (case.representative, case.groups, case.stride[0], "none")
    descriptor.convolve(inputs.x.detach(), packed, ratio, scale, offset, None, *window)

    expected = [mixed(i, case, ratio, scale, offset) for i in (inputs, inputs.to(torch.float64))]
    assert_within_budget("y", y, *expected)
    assert (memory[:guard] == 7).all()
    assert (memory[-guard:] == 7).all()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("first", [16, 3], ids=["on-16-bytes", "off-16-bytes"])
def test_slice_is_read_where_it_lies_or_copied(first: int, stride: int, device: str) -> None:
    whole = torch.randn(2, 4, 4, 80, device=device).half()
    x = whole[..., first : first + 64].permute(0, 3, 1, 2)
    packed = torch.randn(64, 32 + 9 * 32, device=device).half() / 16
    planes = torch.rand(3, 2, 64, device=device)
    results = [
        descriptor.convolve(source, packed, *planes, None, 32, 1, stride, "none")
        for source in (x, x.contiguous(memory_format=torch.channels_last))
    ]
    assert torch.equal(*results)


def test_same_input_same_bits(device: str) -> None:
    inputs = make_inputs(CASES[1], torch.float16, device=device)
    assert torch.equal(layer(inputs, CASES[1])[0], layer(inputs, CASES[1])[0])


def test_weights_are_never_stale(device: str) -> None:
    inputs = make_inputs(PLAIN, torch.float16, device=device)
    before = check(inputs, PLAIN)
    with torch.no_grad():
        inputs.weight_gwc.mul_(-1)
        inputs.weight_pwc.data = torch.randn_like(inputs.weight_pwc) / 8
    assert not torch.equal(check(inputs, PLAIN), before)


@pytest.mark.parametrize(
    "case",
    [
        Case("k5", 1, 64, 64, (6, 6), kernel_size=(5, 5), padding=(2, 2)),
        Case("dilated", 1, 64, 64, (6, 6), dilation=(2, 2)),
        Case("no-padding", 1, 64, 64, (6, 6), padding=(0, 0)),
        Case("stride-2-odd", 1, 64, 64, (6, 7), stride=(2, 2)),
        Case("stride-3", 1, 64, 64, (6, 6), stride=(3, 3)),
        Case("odd-channels", 1, 66, 64, (6, 6)),
        Case("few-channels", 1, 16, 64, (6, 6)),
        Case("few-outputs", 1, 64, 48, (6, 6)),
    ],
    ids=str,
)
def test_other_layers_are_declined(case: Case, device: str) -> None:
    inputs = make_inputs(case, torch.float16, device=device)
    assert not descriptor.supports(inputs.x, inputs.weight_gwc, inputs.weight_pwc, case.geometry)
    with pytest.raises(ValueError, match="path='descriptor' does not take"):
        layer(inputs, case)


def test_float32_is_declined_unless_tf32_is_allowed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptor, "dot_precision", lambda x: "ieee")
    inputs = make_inputs(PLAIN, device=device)
    assert not descriptor.supports(inputs.x, inputs.weight_gwc, inputs.weight_pwc, PLAIN.geometry)
    monkeypatch.setattr(descriptor, "dot_precision", lambda x: "tf32")
    # TF32 has 13 bits fewer; the interpreter multiplies as float32.
    check(inputs, PLAIN, condition=1.0 if INTERPRETED else 2.0**13)


@pytest.mark.parametrize(
    ("found", "expected"), [((7, 0), "ieee"), ((7, 5), "ieee"), ((8, 0), "tf32"), ((8, 9), "tf32"), ((12, 0), "tf32")]
)
def test_there_is_tf32_from_compute_capability_8_on(found: tuple[int, int], expected: str) -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # until the end of the test, as of each in this folder
    x = torch.empty(1, device="meta")
    with dispatch.assuming(found):
        assert common.dot_precision(x) == expected
        assert common.statistics_precision(x) == ("ieee" if expected == "ieee" else "tf32x3")


def test_unknown_path_is_named(device: str) -> None:
    with pytest.raises(ValueError, match="path must be 'auto', 'flat' or 'descriptor', got 'tma'"):
        layer(make_inputs(PLAIN, device=device), PLAIN, "tma")


@pytest.mark.parametrize(
    ("found", "expected"), [(None, False), ((8, 0), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)]
)
def test_choice_by_device(found: Any, expected: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "capability", lambda device: found)
    inputs = make_inputs(PLAIN, torch.float16, device=device)
    assert descriptor.can_run(inputs.x, inputs.weight_gwc, inputs.weight_pwc, PLAIN.geometry) is expected


def test_operator_passes_opcheck(device: str) -> None:
    x = torch.randn(2, 64, 4, 2, device=device).half().contiguous(memory_format=torch.channels_last)
    packed = torch.randn(64, 32 + 9 * 32, device=device).half() / 16
    planes = torch.rand(3, 2, 64, device=device)
    for stride in (1, 2):
        torch.library.opcheck(
            torch.ops.spconv_triton.onepass_descriptor, (x, packed, *planes, None, 32, 1, stride, "none")
        )


@pytest.mark.parametrize("dtype", [*descriptor.DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("case", [PLAIN, replace(PLAIN, in_channels=32), CASES[7]], ids=str)
def test_what_is_described_is_launched(
    case: Case, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []

    def note(_kernel: Any, grid: tuple[int], *_: Any, **options: Any) -> None:
        launched.append(
            "{BLOCK_N} samples x {BLOCK_H} x {BLOCK_W} pixels x {BLOCK_CO} channels, BLOCK_K={BLOCK_K}, "
            "{num_warps} warps, {num_stages} stages, ".format(**options)
            + f"grid {grid}"
        )

    monkeypatch.setattr(descriptor, "launch_untraced", note)
    x = torch.randn(case.batch, case.in_channels, *case.size, device=device).to(dtype)
    packed = torch.randn(64, case.representative * 9 + case.in_channels - case.representative, device=device).to(dtype)
    planes = torch.rand(3, case.batch, 64, device=device)
    arguments = (x, packed, *planes, None, case.representative, 1, case.stride[0], "none")
    descriptor.convolve(*arguments)
    assert launched == [descriptor.describe(*arguments)]


def test_what_is_expanded_is_copied_for_descriptors() -> None:
    """Nobody says whether a descriptor may have pixels that are all the same place."""
    for x in (torch.ones(2, 16, 1, 1).expand(2, 16, 4, 4), torch.ones(1, 16, 1, 1).expand(1, 16, 4, 4)):
        y, spacing = descriptor.aligned(x)
        assert spacing == 16
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, y)
    x = torch.ones(2, 32, 4, 4).contiguous(memory_format=torch.channels_last)[:, :16]
    y, spacing = descriptor.aligned(x)
    assert y is x, "a slice of channels is read in place"
    assert spacing == 32
