"""Norms in the branches: folded into the weights in eval, nn.BatchNorm2d's behaviour in training."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import RESNET50, Results, assert_within_budget, assert_within_budget_over_draws
from fresh import run_python
from lowering import inductor_sources
from test_lowering import calls, launches
from torch import Tensor, nn

from spconv_triton import SPConv2d, dispatch, explain, functional, reference
from spconv_triton.branch_norm import fold_branch_norms, folds
from spconv_triton.dispatch import INTERPRETED
from spconv_triton.native.weights import AVAILABLE

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"padding": 1},
    "stride-2": {"padding": 1, "stride": 2, "alpha": 0.25},
    "dilated": {"padding": 1, "dilation": 2, "bias": False},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "all": {"padding": 1, "alpha": 1.0},
}
every_layer = pytest.mark.parametrize("options", list(LAYERS.values()), ids=list(LAYERS))


def norms(layer: SPConv2d) -> list[nn.Module]:
    return [norm for norm in (layer.norm_representative, layer.norm_redundant) if norm is not None]


def make(*, mean: float = 1.0, **options: Any) -> SPConv2d:
    """A layer whose norms have seen something: no statistic and no parameter is where it starts."""
    layer = SPConv2d(8, 12, 3, branch_norm=True, **options)
    for norm in norms(layer):
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.normal_(norm.running_mean, std=mean)
        nn.init.uniform_(norm.running_var, 0.3, 3)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return layer


def composed(layer: SPConv2d, x: Tensor) -> Tensor:
    """The layer from its parts: the reference's branches and gate around the norms as modules."""
    window: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    if layer.padding_mode != "zeros":
        assert layer.padding == (1, 1)
        x, window["padding"] = nn.functional.pad(x, (1, 1, 1, 1), mode=layer.padding_mode), (0, 0)
    x3, x1 = x.split((layer.representative_channels, layer.redundant_channels), 1)
    u3 = reference.representative_branch(x3, layer.weight_gwc, layer.weight_pwc, groups=layer.groups, **window)
    y = layer.norm_representative(u3)
    if layer.weight_redundant is not None:
        centre = reference.pointwise_input(x1, layer.kernel_size, tuple(u3.shape[2:]), **window)
        u1 = nn.functional.conv2d(centre, layer.weight_redundant)
        y = reference.gap_softmax_fusion(y, layer.norm_redundant(u1))
    return y if layer.bias is None else y + layer.bias[:, None, None].to(y.dtype)


def results(function: Callable[[Tensor], Tensor], layer: SPConv2d, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients by name."""
    x = x.detach().requires_grad_()
    y = function(x)
    wanted = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad), strict=True))}


def assert_as_composed(layer: SPConv2d, draw: Callable[[], Tensor], *, draws: int = 8, condition: float = 1.0) -> None:
    """Output, gradients and statistics, on copies, so that the layer stays as it is."""
    assert_within_budget_over_draws((judged(layer, draw()) for _ in range(draws)), condition=condition)


def judged(layer: SPConv2d, x: Tensor) -> tuple[Results, Results, Results]:
    """All that a step gives: of the layer, of its composition in the same dtype, and in float64."""
    mine, theirs, exact = copy.deepcopy(layer), copy.deepcopy(layer), copy.deepcopy(layer).double()
    grad = torch.randn_like(composed(copy.deepcopy(layer), x))
    found = (
        results(mine, mine, x, grad),
        results(lambda x: composed(theirs, x), theirs, x, grad),
        results(lambda x: composed(exact, x), exact, x.double(), grad.double()),
    )
    for name, value in mine.named_buffers():
        if value.is_floating_point():
            for values, one in zip(found, (mine, theirs, exact), strict=True):
                values[name] = one.get_buffer(name)
        else:
            assert torch.equal(value, theirs.get_buffer(name)), name
    return found


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the unfolded composition, of which a folded layer makes none."""
    calls: list[str] = []
    for name in ("representative_branch", "redundant_branch", "gap_softmax_fusion"):
        original = getattr(functional, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Tensor:
            calls.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(functional, name, counted)
    return calls


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_eval_folds_and_is_the_composition(options: dict[str, Any], dtype: torch.dtype, in_parts: list[str]) -> None:
    """Gradients too, which is fine-tuning on frozen statistics."""
    layer = make(**options).to(dtype).eval()
    like = torch.empty(3, 8, 7, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)
    assert_as_composed(layer, lambda: torch.randn_like(like))
    assert not in_parts


@pytest.mark.parametrize("mean", [100.0, 1e4])
def test_large_means_fold(mean: float, in_parts: list[str]) -> None:
    """The output loses no more than the composition's; the gate's gradient is a difference of sums with the mean."""
    draws = []
    for _ in range(8):  # of one in 25 the error is beyond the budget
        layer = make(padding=0).eval()
        x = torch.randn(3, 8, 7, 6) + mean
        with torch.no_grad():
            x3, x1 = x.split((4, 4), 1)
            layer.norm_representative.running_mean.copy_(
                reference.representative_branch(x3, layer.weight_gwc, layer.weight_pwc).mean((0, 2, 3))
            )
            layer.norm_redundant.running_mean.copy_(nn.functional.conv2d(x1, layer.weight_redundant).mean((0, 2, 3)))
            exact = composed(copy.deepcopy(layer).double(), x.double())
            draws.append(({"y": layer(x)}, {"y": composed(layer, x)}, {"y": exact}))
    assert_within_budget_over_draws(draws, condition=mean / 4)
    # The norms' own gradients are differences of sums with the means of U3 and U1, which are a few times that of x.
    assert_as_composed(layer, lambda: torch.randn(3, 8, 7, 6) + mean, condition=4 * mean)
    assert not in_parts


@pytest.mark.parametrize("affine", [False, True])
def test_frozen_norms_in_a_training_layer_fold(affine: bool, in_parts: list[str]) -> None:
    layer = make(padding=1)
    for name in ("norm_representative", "norm_redundant"):
        norm = getattr(layer, name)
        if not affine:
            bare = nn.BatchNorm2d(12, affine=False)
            bare.load_state_dict({k: v for k, v in norm.state_dict().items() if k not in ("weight", "bias")})
            setattr(layer, name, bare)
        getattr(layer, name).eval().requires_grad_(False)
    assert layer.training
    before = copy.deepcopy(layer.state_dict())
    assert_as_composed(layer, lambda: torch.randn(2, 8, 5, 6))
    layer(torch.randn(2, 8, 5, 6)).sum().backward()
    assert not in_parts
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for norm in norms(layer) for p in norm.parameters())


def test_folding_is_never_stale() -> None:
    layer = make(padding=1).eval()
    x = torch.randn(2, 8, 5, 6)

    def check() -> Tensor:
        with torch.no_grad():
            torch.testing.assert_close(layer(x), composed(layer, x))
            return layer(x)

    changed: list[Callable[[], Any]] = [
        lambda: layer.norm_redundant.running_mean.add_(1),
        lambda: layer.norm_representative.running_var.mul_(2),
        lambda: layer.weight_pwc.mul_(2),
        lambda: layer.norm_representative.bias.sub_(1),
        lambda: setattr(layer.norm_redundant, "eps", 0.5),
        lambda: layer.load_state_dict(make(padding=1).state_dict()),
        lambda: setattr(layer, "norm_redundant", nn.BatchNorm2d(12).eval()),
    ]
    before = check()
    for change in changed:
        with torch.no_grad():
            change()
        after = check()
        assert not torch.equal(before, after)
        before = after


class ScaledBatchNorm2d(nn.BatchNorm2d):
    """Computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked(register: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        norm = nn.BatchNorm2d(12)
        hook = (lambda _, inputs: (inputs[0] + 1,)) if "pre" in register else lambda _, inputs, output: output + 1
        getattr(norm, register)(hook)
        return norm

    return build


def with_forward_of_its_own() -> nn.Module:
    norm = nn.BatchNorm2d(12)
    norm.forward = lambda x: 3 * x  # type: ignore[method-assign]
    return norm


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "batch-statistics": lambda: nn.BatchNorm2d(12, track_running_stats=False),
    "group-norm": lambda: nn.GroupNorm(3, 12),
    "instance-norm": lambda: nn.InstanceNorm2d(12),
    "subclass": lambda: ScaledBatchNorm2d(12),
    "hook": hooked("register_forward_hook"),
    "pre-hook": hooked("register_forward_pre_hook"),
    "forward": with_forward_of_its_own,
    "identity": nn.Identity,
}


@pytest.mark.parametrize("name", ["norm_representative", "norm_redundant"])
@pytest.mark.parametrize("build", list(OTHERS.values()), ids=list(OTHERS))
def test_what_is_no_affine_map_stands_in_its_branch(
    build: Callable[[], nn.Module], name: str, in_parts: list[str]
) -> None:
    layer = make(padding=1)
    setattr(layer, name, build())
    layer.eval()
    x = torch.randn(2, 8, 5, 6)
    assert not folds(layer)
    torch.testing.assert_close(layer(x), composed(layer, x))
    assert len(in_parts) == 3
    with pytest.raises(ValueError, match=f"{name} must be a BatchNorm2d or SyncBatchNorm without hooks"):
        fold_branch_norms(layer)


def test_a_branch_may_do_without_its_norm() -> None:
    layer = make(padding=1).eval()
    x = torch.randn(2, 8, 5, 6)
    for name in ("norm_redundant", "norm_representative"):
        one = copy.deepcopy(layer)
        setattr(one, name, nn.Identity())
        expected = one(x)
        setattr(one, name, None)
        assert one.branch_norm
        assert torch.equal(one(x), expected)
    one.norm_redundant = None
    assert not one.branch_norm


def test_folded_weights_are_those_of_a_layer_without_norms() -> None:
    layer = make(padding=1).to(memory_format=torch.channels_last).eval()
    gwc, pwc, redundant, branch_bias = fold_branch_norms(layer)
    for folded, weight in ((gwc, layer.weight_gwc), (pwc, layer.weight_pwc), (redundant, layer.weight_redundant)):
        assert (folded.shape, folded.dtype, folded.stride()) == (weight.shape, weight.dtype, weight.stride())
    assert branch_bias.shape == (2, 12)
    x = torch.randn(2, 8, 5, 6)
    y = reference.spconv2d(x, gwc, pwc, redundant, layer.bias, padding=1, branch_bias=branch_bias)
    torch.testing.assert_close(y, composed(layer, x))
    assert fold_branch_norms(layer.half())[3].dtype == torch.float32
    assert fold_branch_norms(layer.double())[3].dtype == torch.float64


def test_norms_kept_in_float32_fold_into_half_weights() -> None:
    layer = make(padding=1).bfloat16().eval()
    for norm in norms(layer):
        norm.float()
    x = torch.randn(2, 8, 5, 6).bfloat16()
    assert folds(layer)
    with torch.no_grad():
        exact = composed(copy.deepcopy(layer).double(), x.double())
        assert_within_budget("y", layer(x), composed(layer, x), exact)


@pytest.mark.parametrize(("name", "training"), [("plain", False), ("all", False), ("stride-2", True)])
def test_compiles_to_one_graph(name: str, training: bool) -> None:
    torch._dynamo.reset()
    layer = make(**LAYERS[name]).train(training)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 6, 7)
    grad = torch.randn_like(composed(copy.deepcopy(layer), x))
    got, expected = results(compiled, layer, x, grad), results(twin, twin, x, grad)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, msg=lambda m, key=key: f"{key}: {m}")
    for key, value in layer.named_buffers():
        torch.testing.assert_close(value, twin.get_buffer(key))


def test_exports() -> None:
    layer = make(padding=1, stride=2).eval()
    x = torch.randn(2, 8, 9, 7)
    program = torch.export.export(layer, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), composed(layer, x))
    assert not [n for n in program.graph.nodes if "batch_norm" in str(n.target)]


needs_triton = pytest.mark.skipif(
    not dispatch.HAS_TRITON or INTERPRETED or not torch.backends.cuda.is_built(),
    reason="traces for a GPU: needs triton and a torch built for CUDA, and runs natively",
)


@needs_triton
@pytest.mark.filterwarnings("ignore")  # Inductor's own
def test_lowered_eval_is_three_launches_and_the_folding() -> None:
    """The folding is one generated kernel of the weights' sizes here, where what is not ours is generated as C++."""
    layer = SPConv2d(32, 32, 3, padding=1, branch_norm=True, backend="triton").eval()
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    forward, backward = inductor_sources(layer, x)
    assert launches(forward) == ["window_statistics", "gate_planes", "onepass_forward"]
    calls = [line.split("(")[0].strip() for line in forward.splitlines() if line.strip().startswith("cpp_fused")]
    assert len([name for name in calls if "rsqrt" in name and "=" not in name]) == 1
    assert {name.rpartition("_")[0] for name in calls if "rsqrt" not in name and "=" not in name} <= {"cpp_fused_empty"}
    assert "batch_norm" not in forward.partition("def call")[2]
    assert launches(backward) == ["weight_grad", "gate_grad", "finish_weights"]


@needs_triton
@pytest.mark.parametrize(
    ("capability", "path", "kernel"),
    [((9, 0), "descriptor", "onepass_descriptor"), ((8, 0), "flat", "onepass_forward")],
)
def test_explain_says_one_pass(capability: tuple[int, int], path: str, kernel: str) -> None:
    case = RESNET50[1]
    layer = SPConv2d(128, 128, 3, padding=1, bias=False, branch_norm=True, dtype=torch.float16).eval()
    x = torch.empty(case.batch, 128, *case.size, dtype=torch.float16, device="meta")
    found = explain(layer, x.to(memory_format=torch.channels_last), capability=capability)
    assert (found.path.backend, found.path.name) == ("triton", path)
    ours = [launch.name.rpartition("::")[2] for launch in found.launches if launch.tiles]
    assert ours == ["window_statistics", "gate_planes", kernel]
    assert found.kept_bytes <= 1.05 * found.input_bytes


@pytest.mark.skipif(not AVAILABLE, reason="this PyTorch has no oneDNN")
def test_explain_says_folded_weights_on_a_cpu() -> None:
    x = torch.randn(8, 64, 28, 28).to(memory_format=torch.channels_last)
    layer = SPConv2d(64, 64, 3, padding=1, branch_norm=True)
    assert explain(layer, x).path.name == "batch norm"
    assert explain(layer.eval(), x).path.name == "folded weights"


MOMENTA = {
    "default": {},
    "fast": {"momentum": 0.5, "eps": 0.1},
    "cumulative": {"momentum": None},
    "untracked": {"track_running_stats": False},
    "bare": {"affine": False},
}


def with_norms(layer: SPConv2d, **options: Any) -> SPConv2d:
    """A layer with fresh norms of these options, whatever their parameters' values."""
    layer.norm_representative, layer.norm_redundant = (nn.BatchNorm2d(12, **options) for _ in range(2))
    for norm in norms(layer):
        if norm.affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return layer


@pytest.mark.parametrize("options", list(MOMENTA.values()), ids=list(MOMENTA))
def test_several_steps_are_the_compositions(options: dict[str, Any]) -> None:
    layer = with_norms(make(padding=1), **options)
    for step in range(3):

        def draw(step: int = step) -> Tensor:
            return torch.randn(4, 8, 6, 5) * (1 + step) + step

        assert_as_composed(layer, draw, condition=2)  # one rounding of a mean of 2, before the norm takes it away
        layer(draw())
    layer.eval()
    assert_as_composed(layer, lambda: torch.randn(2, 8, 6, 5), condition=2)
    for norm in norms(layer):
        assert norm.num_batches_tracked is None or norm.num_batches_tracked == 3


def test_one_norm_frozen_and_the_other_not() -> None:
    layer = make(padding=1)
    layer.norm_redundant.eval()
    frozen = copy.deepcopy(layer.norm_redundant.state_dict())
    assert_as_composed(layer, lambda: torch.randn(3, 8, 5, 6))
    layer(torch.randn(3, 8, 5, 6))
    for name, value in layer.norm_redundant.state_dict().items():
        assert torch.equal(value, frozen[name]), name
    assert layer.norm_representative.num_batches_tracked == 1


def test_one_value_per_channel_has_no_variance() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        make(padding=1)(torch.randn(1, 8, 1, 1))


def test_converted_to_sync_batch_norm() -> None:
    """Without a process group a SyncBatchNorm is a BatchNorm2d, on a CPU too."""
    layer = make(padding=1)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer))
    assert [type(norm) for norm in norms(converted)] == [nn.SyncBatchNorm, nn.SyncBatchNorm]
    assert list(converted.state_dict()) == list(layer.state_dict())
    for step in range(2):
        x = torch.randn(4, 8, 6, 5) + step
        assert_as_composed(converted, lambda step=step: torch.randn(4, 8, 6, 5) + step)
        assert torch.equal(converted(x), layer(x))
    for name, value in layer.state_dict().items():
        assert torch.equal(converted.state_dict()[name], value), name
    converted.eval()
    assert folds(converted)
    assert torch.equal(converted(x), layer.eval()(x))


def test_sync_batch_norm_in_a_process_group(tmp_path: Path) -> None:
    """On a CPU PyTorch refuses to train it; eval needs no communication and folds."""
    code = f"""
import torch
from torch import distributed, nn
from spconv_triton import SPConv2d
distributed.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
layer = SPConv2d(8, 12, 3, padding=1, branch_norm=True)
converted = nn.SyncBatchNorm.convert_sync_batchnorm(SPConv2d(8, 12, 3, padding=1, branch_norm=True))
converted.load_state_dict(layer.state_dict())
x = torch.randn(2, 8, 5, 6)
print(torch.equal(converted.eval()(x), layer.eval()(x)))
try:
    converted.train()(x)
except ValueError as error:
    print("SyncBatchNorm expected input tensor to be on" in str(error))
distributed.destroy_process_group()
"""
    assert run_python(code, tmp_path) == "True\nTrue\n"


@needs_triton
@pytest.mark.filterwarnings("ignore")  # Inductor's own
def test_lowered_training_is_four_launches_and_six() -> None:
    """At any size. Beside them the forward has the counters and the running statistics, in one generated pass each."""
    layer = SPConv2d(32, 32, 3, padding=1, branch_norm=True, backend="triton").to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 8, 10).contiguous(memory_format=torch.channels_last).requires_grad_()
    for axis in (0, 2, 3):
        torch._dynamo.mark_dynamic(x, axis)
    forward, backward = inductor_sources(layer, x, dynamic=True)
    assert launches(forward) == ["branches_forward", "sample_moments", "norm_gate", "norm_blend"]
    assert launches(backward) == [
        *("norm_sums", "norm_coefficients", "norm_blend_grad"),
        *("weight_grad", "finish_weights", "input_grad"),
    ]
    generated = re.findall(r"^\s*cpp_fused_(\w+)\(", forward + backward, re.M)
    assert [name for name in generated if not name.startswith("empty")] == [*generated[:1], *generated[-1:]]
    assert "lerp" in generated[-1]
    assert [call.name for call in calls(forward) if not call.symbolic] == ["norm_gate"]  # one program a few channels


@pytest.mark.parametrize("name", ["norm_representative", "norm_redundant"])
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_norms_with_backward_hooks_do_not_fold(register: str, name: str) -> None:
    layer = SPConv2d(8, 8, 3, padding=1, branch_norm=True).eval()
    seen: list[str] = []
    getattr(getattr(layer, name), register)(lambda *_: seen.append(name))
    assert not folds(layer)
    layer(torch.randn(2, 8, 5, 6)).sum().backward()
    assert seen == [name]


def test_statistics_that_are_no_longer_tracked_stay() -> None:
    layer = SPConv2d(8, 8, 3, padding=1, branch_norm=True)
    for norm in (layer.norm_representative, layer.norm_redundant):
        norm.track_running_stats = False
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(3, 8, 5, 6))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_float64_norms_fold_into_float32_weights() -> None:
    layer = SPConv2d(8, 8, 3, padding=1, branch_norm=True).eval()
    same = copy.deepcopy(layer)
    for norm in (layer.norm_representative, layer.norm_redundant):
        norm.double()
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(layer(x), same(x))
    assert fold_branch_norms(layer)[3].dtype == torch.float32


def test_an_empty_batch_in_training() -> None:
    assert SPConv2d(8, 8, 3, padding=1, branch_norm=True)(torch.empty(0, 8, 6, 5)).shape == (0, 8, 6, 5)


def test_other_norms_name_wrong_channels() -> None:
    layer = SPConv2d(8, 8, 3, padding=1, branch_norm=True)
    layer.norm_representative, layer.norm_redundant = nn.GroupNorm(2, 8), nn.GroupNorm(2, 8)
    with pytest.raises(ValueError, match="x must have 8 channels, got 9"):
        layer(torch.randn(2, 9, 6, 5))
