"""Batch norms in the branches by the kernels: against float64, and against the modules whose state they move."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import SMALL, Case, assert_within_budget_over_draws, kept_bytes
from norm_cases import NORMS, batch_normed, check_over_draws, layer, make_leaves, run
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spconv_triton import SPConv2d

pytestmark = pytest.mark.usefixtures("poisoned_empty")

NORMS_WITHOUT_BIAS = "bias" in inspect.signature(nn.BatchNorm2d).parameters
"""Whether this PyTorch has them."""

# The moments are taken by blocks of 128 pixels: there are several samples to a block or several blocks to a sample,
# neither dividing the other; "aligned" has samples that begin with a block.
ROW: dict[str, Any] = {"kernel_size": (1, 3), "padding": (0, 1), "groups": 1}  # few taps: the interpreter is slow
CASES = (
    *(case for case in SMALL if case.name in ("odd-channels", "stride-2-odd", "stride-3-shifted", "one-pixel")),
    Case("tiny", 3, 4, 6, (4, 3), **ROW),
    Case("aligned", 3, 8, 8, (8, 8), **ROW),
    Case("many-samples", 5, 8, 12, (7, 5), **ROW),
    Case("many-blocks", 2, 8, 8, (13, 11), **ROW),
)
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.drawn(6, "case", CASES, ids=str)
def test_agrees_with_float64(case: Case, device: str) -> None:
    check_over_draws(lambda: make_leaves(case, device), case, 6, "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["many-samples", "one-pixel"])
def test_half_precision(name: str, dtype: torch.dtype, device: str) -> None:
    check_over_draws(lambda: make_leaves(BY_NAME[name], device, dtype), BY_NAME[name], 6, "triton")


@pytest.mark.parametrize("missing", [("bias",), ("weight3", "bias3"), ("bias3", "weight1"), NORMS], ids=str)
def test_without_some_parameters(missing: tuple[str, ...], device: str) -> None:
    case = BY_NAME["many-samples"]
    check_over_draws(lambda: {**make_leaves(case, device), **dict.fromkeys(missing)}, case, 4, "triton")


@pytest.mark.parametrize("gate", [-60.0, 60.0])
def test_saturated_gate(gate: float, device: str) -> None:
    case = BY_NAME["many-samples"]
    check_over_draws(lambda: make_leaves(case, device, gate=gate), case, 2, "triton", condition=abs(gate))


@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
def test_agrees_over_many_draws(mean: float, device: str) -> None:
    case = replace(BY_NAME["tiny"], batch=4)
    check_over_draws(lambda: make_leaves(case, device, mean=mean), case, 8, "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_means_in_half_precision(dtype: torch.dtype, device: str) -> None:
    case = BY_NAME["tiny"]
    check_over_draws(lambda: make_leaves(case, device, dtype, mean=30.0), case, 10, "triton")


def test_variance_does_not_cancel(device: str) -> None:
    """A mean of 10,000 standard deviations: a sum of squares in float32 would have no correct digit of the variance.

    What remains is the rounding of the blocks' means.
    """
    case = BY_NAME["many-blocks"]
    leaves = make_leaves(case, device)
    with torch.no_grad():
        for name in ("weight_gwc", "weight_pwc", "weight_redundant"):
            leaves[name].zero_()
        leaves["weight_pwc"][:, :, 0, 0].copy_(torch.eye(8, device=device)[:, :4])
        leaves["weight_redundant"][:, :, 0, 0].copy_(torch.eye(8, device=device)[:, :4])
        leaves["x"] += 1e4
    got = run(leaves, case, "triton")
    used = leaves["x"].double().transpose(0, 1).flatten(1)
    for branch, channels in enumerate((used[:4], used[4:])):
        torch.testing.assert_close(got["mean"][branch, :4].double(), channels.mean(1), rtol=2**-23, atol=0)
        torch.testing.assert_close(
            got["variance"][branch, :4].double(), channels.var(1, correction=0), rtol=1e-3, atol=0
        )
    assert not got["mean"][:, 4:].any()
    assert not got["variance"][:, 4:].any()


def test_same_input_same_bits(device: str) -> None:
    case = BY_NAME["many-blocks"]
    leaves = make_leaves(case, device, torch.float16)
    grad = torch.randn((case.batch, case.out_channels, *case.output_size()), device=device)
    first, second = (run(leaves, case, "triton", grad) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format_is_kept(memory_format: torch.memory_format, device: str) -> None:
    case = BY_NAME["aligned"]
    leaves = make_leaves(case, device, memory_format=memory_format)
    assert run(leaves, case, "triton")["y"].is_contiguous(memory_format=memory_format)
    check_over_draws(lambda: make_leaves(case, device, memory_format=memory_format), case, 6, "triton")


def test_what_is_kept_for_the_backward(device: str) -> None:
    """x, the branches, the parameters, and O(N M) numbers; the composition of modules keeps the branches twice."""
    case = Case("memory", 2, 32, 32, (16, 16))
    leaves = make_leaves(case, device)
    kept = kept_bytes(lambda: layer(leaves, case, "triton")[0])
    maps = leaves["x"].numel() * leaves["x"].itemsize
    small = sum(leaf.numel() * leaf.itemsize for name, leaf in leaves.items() if name != "x")
    assert 3 * maps < kept <= 3.1 * maps + small


def test_passes_opcheck(device: str) -> None:
    case = BY_NAME["tiny"]
    leaves = make_leaves(case, device)
    window = (*map(list, (case.stride, case.padding, case.dilation)), case.groups)
    arguments = [leaves[name] for name in ("x", "weight_gwc", "weight_pwc", "weight_redundant", "bias")]
    norms = [leaves[name] for name in NORMS]
    operator = torch.ops.spconv_triton.spconv2d_batch_norm.default
    torch.library.opcheck(operator, (*arguments, *norms, 1e-5, 1e-3, *window))
    torch.library.opcheck(operator, (*arguments[:4], None, None, norms[1], norms[2], None, 1e-5, 1e-3, *window))
    arguments, norms = ([tensor.detach() for tensor in tensors] for tensors in (arguments, norms))
    y, *kept = operator(*arguments, *norms, 1e-5, 1e-3, *window)
    backward = torch.ops.spconv_triton.spconv2d_batch_norm_backward.default
    torch.library.opcheck(backward, (torch.randn_like(y), *arguments[:4], *norms, *kept, *window))


def test_flops_are_counted(device: str) -> None:
    case = BY_NAME["aligned"]
    leaves = make_leaves(case, device)
    weights = sum(leaves[name].numel() for name in ("weight_gwc", "weight_pwc", "weight_redundant"))
    forward = 2 * weights * case.batch * case.output_size()[0] * case.output_size()[1]
    with FlopCounterMode(display=False) as counter:
        y = layer(leaves, case, "triton")[0]
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward


MODULES: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"momentum": 0.5, "eps": 0.1},
    "cumulative": {"momentum": None},
    "untracked": {"track_running_stats": False},
    "bare": {"affine": False},
    "no-bias": {"bias": False},
}


def make_pair(device: str, **options: Any) -> tuple[SPConv2d, SPConv2d]:
    """A layer on the kernels and its twin part by part."""
    ours = SPConv2d(8, 12, (1, 3), padding=(0, 1), groups=1, branch_norm=True)
    for name in ("norm_representative", "norm_redundant"):
        norm = nn.BatchNorm2d(12, **options)
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        setattr(ours, name, norm)
    ours.to(device)
    twin = copy.deepcopy(ours)
    ours.backend, twin.backend = "triton", "reference"
    return ours, twin


def step(ours: SPConv2d, twin: SPConv2d, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """One call of each in the mode they are in, and of the twin in float64: output, gradients and state."""
    results = []
    for module in (ours, twin, copy.deepcopy(twin).double()):
        leaf = x.detach().to(module.weight_gwc.dtype).requires_grad_()
        y = module(leaf)
        wanted = {"x": leaf, **dict(module.named_parameters())}
        grads = torch.autograd.grad(
            (y * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum(), wanted.values()
        )
        state = {name: buffer.clone() for name, buffer in module.named_buffers() if buffer.is_floating_point()}
        results.append({"y": y.detach(), **dict(zip(wanted, grads, strict=True)), **state})
    for name in ("norm_representative", "norm_redundant"):
        ours_tracked, twins_tracked = (getattr(getattr(m, name), "num_batches_tracked", None) for m in (ours, twin))
        assert ours_tracked is twins_tracked is None or torch.equal(ours_tracked, twins_tracked)
    got, same_dtype, exact = results
    return got, same_dtype, exact


DRAWS = 4
"""Of a layer and its input: errors of single draws are luck, as in :func:`check_over_draws`."""


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends of the calls that normalise by the batch in one operator."""
    return batch_normed(monkeypatch)


@pytest.mark.parametrize("options", list(MODULES.values()), ids=list(MODULES))
def test_several_steps_are_the_modules(options: dict[str, Any], device: str, by_kernels: list[str]) -> None:
    if "bias" in options and not NORMS_WITHOUT_BIAS:
        pytest.skip("nn.BatchNorm2d has no such option in this PyTorch")
    steps: list[Any] = [[], [], []]  # two in training, one in eval
    for _ in range(DRAWS):
        ours, twin = make_pair(device, **options)
        for number in range(2):
            x = torch.randn(3, 8, 5, 6, device=device) * (1 + number) + number
            steps[number].append(step(ours, twin, x))
        steps[2].append(step(ours.eval(), twin.eval(), torch.randn(3, 8, 5, 6, device=device)))
    for draws, condition in zip(steps, (2, 4, 2), strict=True):  # a mean of x grows a rounding of the shared constants
        assert_within_budget_over_draws(draws, condition=condition)
    untracked = options.get("track_running_stats") is False
    in_operator = 2 + untracked  # without running statistics eval normalises by the batch too
    assert by_kernels == ["triton"] * (in_operator * DRAWS)


def test_frozen_norms_and_parameters(device: str, by_kernels: list[str]) -> None:
    """A norm on its running statistics is not the batch's affair; a parameter without gradient is."""
    draws = []
    for _ in range(DRAWS):
        ours, twin = make_pair(device)
        x = torch.randn(3, 8, 5, 6, device=device)
        for module in (ours, twin):
            module.norm_redundant.eval()
        draws.append(step(ours, twin, x))
    assert_within_budget_over_draws(draws, condition=2)
    assert not by_kernels
    for module in (ours, twin):
        module.norm_redundant.train().requires_grad_(False)
        module(x).sum().backward()
        assert module.norm_redundant.weight.grad is None
        assert module.norm_representative.weight.grad is not None
    assert by_kernels == ["triton"]


@pytest.mark.parametrize("other", [nn.GroupNorm(3, 12), nn.InstanceNorm2d(12, affine=True)], ids=repr)
def test_other_norms_are_called_as_they_are(other: nn.Module, device: str, by_kernels: list[str]) -> None:
    draws = []
    for _ in range(DRAWS):
        ours, twin = make_pair(device)
        for module in (ours, twin):
            module.norm_redundant = copy.deepcopy(other).to(device)
        draws.append(step(ours, twin, torch.randn(3, 8, 5, 6, device=device)))
    assert_within_budget_over_draws(draws, condition=2)
    assert not by_kernels


def test_sync_batch_norm_without_a_process_group(device: str, by_kernels: list[str]) -> None:
    draws = []
    for _ in range(DRAWS):
        ours, twin = make_pair(device)
        synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
        draws.append(step(synchronised, twin, torch.randn(3, 8, 5, 6, device=device)))
    assert_within_budget_over_draws(draws, condition=2)
    assert by_kernels == ["triton"] * DRAWS


def test_sync_batch_norm_in_a_process_group_is_called(
    device: str, by_kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It alone knows how to ask the others."""
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(make_pair(device)[0])
    called = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, u: called.append(self) or u)
    ours(torch.randn(3, 8, 5, 6, device=device))
    assert called == [ours.norm_representative, ours.norm_redundant]
    assert not by_kernels


def test_autocast_normalises_in_float32(device: str) -> None:
    ours, twin = make_pair(device)
    x = torch.randn(3, 8, 5, 6, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = ours(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())
    expected = twin(x)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.05 * expected.detach().abs().max().item())
    assert ours.norm_representative.running_mean.dtype == torch.float32


def test_one_graph_serves_every_size(device: str) -> None:
    torch._dynamo.reset()
    ours, _ = make_pair(device)
    twin = copy.deepcopy(ours)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 8, 6, 7), (3, 8, 5, 3), (4, 8, 8, 16)):  # the last: a sample is a block
        x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        with torch._dynamo.config.patch(error_on_recompile=shape[0] > 2):
            y = compiled(x)
        expected = twin(x)
        torch.testing.assert_close(y, expected)
        grads = (torch.autograd.grad(z.square().sum(), m.parameters()) for z, m in ((y, ours), (expected, twin)))
        for grad, expected_grad in zip(*grads, strict=True):
            torch.testing.assert_close(grad, expected_grad)
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, twin.state_dict()[name], msg=name)


def test_empty_batch_is_left_to_the_modules(device: str, by_kernels: list[str]) -> None:
    ours, twin = make_pair(device)
    x = torch.empty(0, 8, 5, 6, device=device)
    assert ours(x).shape == twin(x).shape == (0, 12, 5, 6)
    assert not by_kernels


def test_what_it_refuses(device: str) -> None:
    case = BY_NAME["aligned"]
    leaves = make_leaves(case, device)
    for backend in ("triton", "native"):
        with pytest.raises(
            ValueError, match=r"x must give more than 1 value per channel to normalise, got \[1, 8, 1, 1"
        ):
            layer({**leaves, "x": leaves["x"][:1, :, :1, :1]}, case, backend)
        with pytest.raises(ValueError, match=r"norm_redundant must be \[8\], got \[7\]"):
            layer({**leaves, "weight1": leaves["weight1"][1:]}, case, backend)
        with pytest.raises(TypeError, match="norm_representative must have the dtype of x"):
            layer({**leaves, "bias3": leaves["bias3"].half()}, case, backend)
        with pytest.raises(ValueError, match="weight_redundant must have at least one input channel"):
            layer({**leaves, "x": leaves["x"][:, :4], "weight_redundant": None}, case, backend)
