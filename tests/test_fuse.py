"""fuse: what folds, what stays and why, and that results stay what they were."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_within_budget
from torch import Tensor, nn

from spconv_triton import SPConv2d, convert, fuse
from spconv_triton.fused import FusedSPConv2d
from spconv_triton.fusing import Fusion

CHANNELS = 8
ACTIVATIONS: dict[str, list[Callable[[], Callable[[Tensor], Tensor]]]] = {
    "relu": [
        nn.ReLU,
        lambda: nn.ReLU(inplace=True),
        lambda: F.relu,
        lambda: torch.relu,
        lambda: torch.relu_,
        lambda: lambda y: F.relu(y, inplace=True),
        lambda: lambda y: F.relu(y, True),
        lambda: lambda y: y.relu(),
        lambda: lambda y: y.relu_(),
    ],
    "relu6": [nn.ReLU6, lambda: nn.ReLU6(inplace=True), lambda: F.relu6],
    "silu": [nn.SiLU, lambda: nn.SiLU(inplace=True), lambda: F.silu, lambda: lambda y: F.silu(y, inplace=True)],
}
SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "y + x": lambda y, x: y + x,
    "x + y": lambda y, x: x + y,
    "torch.add(y, x)": lambda y, x: torch.add(y, x),
    "torch.add(x, y)": lambda y, x: torch.add(x, y),
    "y.add(x)": lambda y, x: y.add(x),
    "y.add_(x)": lambda y, x: y.add_(x),
}


def layer(channels: int = CHANNELS, **options: Any) -> SPConv2d:
    return SPConv2d(channels, channels, 3, padding=1, **options)


def norm(**options: Any) -> nn.BatchNorm2d:
    """With statistics, scales of either sign and shifts."""
    return stirred(nn.BatchNorm2d(CHANNELS, **options))


def stirred(module: nn.Module) -> Any:
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                if part.running_mean is not None:
                    part.running_mean.normal_()
                    part.running_var.uniform_(0.2, 3)
                if part.affine:
                    part.weight.normal_()
                    part.bias.normal_()
    return module


class Net(nn.Module):
    """``forward(self, x)`` as a function of the parts, which are modules."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self.parts, x)


def images(dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    return torch.randn(batch, CHANNELS, 7, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)


def fusion(model: nn.Module) -> Fusion:
    found: list[Fusion] = []
    fuse(model, report=found.append)
    return found[0]


def layers(model: nn.Module) -> dict[str, FusedSPConv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedSPConv2d)}


def check(model: nn.Module, *folded: tuple[str, ...], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Fuse it, find ``folded`` in the layers in order, and compare with float64 and with the model as it was."""
    model = model.eval().to(dtype)
    x = images(dtype)
    state = copy.deepcopy(model.state_dict())
    found = fusion(model)
    assert tuple(fold.folded for fold in found.fused) == folded, str(found)
    fused = fuse(model)
    assert len(layers(fused)) == len(folded)
    with torch.no_grad():
        before = x.clone()
        got = fused(x)
        assert torch.equal(x, before), "the input was written to"
        assert_within_budget("y", got, model(x.clone()), copy.deepcopy(model).double()(x.double()))
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), f"{key} was written to"
    again = fuse(fused)
    assert fusion(fused).fused == ()
    with torch.no_grad():
        assert torch.equal(again(x), got)
    return fused


def kept(model: nn.Module, reason: str) -> None:
    """Nothing folds, for ``reason``, and results are the very same."""
    model = model.eval()
    found = fusion(model)
    assert found.fused == (), str(found)
    assert all(reason in fold.reason for fold in found.kept), str(found)
    fused = fuse(model)
    assert not layers(fused)
    x = images()
    with torch.no_grad():
        for got, expected in zip(as_tuple(fused(x)), as_tuple(model(x)), strict=True):
            assert torch.equal(got, expected)


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


# What folds.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"alpha": 1.0}, {"alpha": 0.25, "groups": 1}, {"branch_norm": True}],
    ids=lambda options: ", ".join(f"{k}={v}" for k, v in options.items()) or "plain",
)
def test_norm_and_activation(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = nn.Sequential(stirred(layer(**options)), norm(eps=0.1), nn.ReLU())
    branches = ("branch norms",) if "branch_norm" in options else ()
    fused = check(model, (*branches, "1", "relu"), dtype=dtype)
    assert [type(part) for part in fused] == [FusedSPConv2d, nn.Identity, nn.Identity]


@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}, {"eps": 1.0}], ids=str)
def test_every_kind_of_batch_norm(options: dict[str, Any]) -> None:
    check(nn.Sequential(layer(), norm(**options)), ("1",))


def test_sync_batch_norm_is_a_batch_norm_in_eval() -> None:
    check(nn.Sequential(layer(), stirred(nn.SyncBatchNorm(CHANNELS))), ("1",))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        pytest.param(name, make, id=f"{name}-{index}")
        for name, makers in ACTIVATIONS.items()
        for index, make in enumerate(makers)
    ],
)
def test_every_spelling_of_an_activation(name: str, make: Callable[[], Any]) -> None:
    made = make()
    parts = {"activation": made} if isinstance(made, nn.Module) else {}

    def activate(p: Any, y: Tensor) -> Tensor:
        return p.activation(y) if parts else made(y)

    check(Net(lambda p, x: activate(p, p.norm(p.conv(x))), conv=layer(), norm=norm(), **parts), ("parts.norm", name))
    check(Net(lambda p, x: activate(p, p.conv(x)), conv=layer(), **parts), (name,))


@pytest.mark.parametrize("spelling", SUMS)
def test_every_spelling_of_a_residual(spelling: str) -> None:
    add = SUMS[spelling]
    model = Net(lambda p, x: F.relu(add(p.norm(p.conv(x)), x)), conv=layer(), norm=norm())
    check(model, ("parts.norm", "residual", "relu"))
    check(Net(lambda p, x: add(p.conv(x), x), conv=layer()), ("residual",))


def test_residual_by_augmented_assignment() -> None:
    def forward(p: Any, x: Tensor) -> Tensor:
        y = p.norm(p.conv(x))
        y += x
        return F.silu(y)

    check(Net(forward, conv=layer(), norm=norm()), ("parts.norm", "residual", "silu"))

    def onto_the_shortcut(p: Any, x: Tensor) -> Tensor:
        shortcut = p.shortcut(x)
        shortcut += p.norm(p.conv(x))
        return F.relu(shortcut)

    shortcut = nn.Conv2d(CHANNELS, CHANNELS, 1)
    check(Net(onto_the_shortcut, conv=layer(), norm=norm(), shortcut=shortcut), ("parts.norm", "residual", "relu"))


def test_residual_of_another_shape_or_dtype_is_added_as_before() -> None:
    model = Net(lambda p, x: F.relu(p.conv(x) + x.mean((2, 3), keepdim=True)), conv=layer())
    check(model, ("residual", "relu"))
    model = Net(lambda p, x: F.relu(x[:1].double() + p.conv(x)), conv=layer()).eval()
    x = images()
    with torch.no_grad():
        got, expected = fuse(model)(x), model(x)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_an_activation_ends_what_folds() -> None:
    check(nn.Sequential(layer(), nn.ReLU(), norm()), ("relu",))
    check(Net(lambda p, x: F.relu(p.norm(p.conv(x))) + x, conv=layer(), norm=norm()), ("parts.norm", "relu"))
    check(Net(lambda p, x: p.norm(p.conv(x) + x), conv=layer(), norm=norm()), ("residual",))


def test_only_the_first_of_two_norms_folds() -> None:
    check(nn.Sequential(layer(), norm(), norm(), nn.ReLU()), ("1",))


def test_branch_norms_fold_where_nothing_follows() -> None:
    model = Net(lambda p, x: p.conv(x) * p.conv(x), conv=stirred(layer(branch_norm=True)))
    check(model, ("branch norms",))


def test_a_sum_of_two_layers_goes_to_one() -> None:
    model = Net(
        lambda p, x: F.relu(p.norm1(p.conv1(x)) + p.norm2(p.conv2(x))),
        conv1=layer(), norm1=norm(), conv2=layer(), norm2=norm(),
    )  # fmt: skip
    check(model, ("parts.norm1", "residual", "relu"), ("parts.norm2",))


def test_a_layer_called_twice_with_the_same_followers_folds() -> None:
    model = Net(lambda p, x: F.relu(p.norm(p.conv(F.relu(p.norm(p.conv(x)))))), conv=layer(), norm=norm())
    check(model, ("parts.norm", "relu"))


def test_a_norm_of_two_layers_folds_into_both() -> None:
    model = Net(lambda p, x: p.norm(p.conv1(x)) + p.norm(p.conv2(x)), conv1=layer(), conv2=layer(), norm=norm())
    check(model, ("parts.norm", "residual"), ("parts.norm",))


def test_what_follows_outside_the_module_that_calls_the_layer() -> None:
    inner = nn.Sequential(layer(), norm())
    check(Net(lambda p, x: F.relu(p.inner(x) + x), inner=inner), ("parts.inner.1", "residual", "relu"))
    check(Net(lambda p, x: p.act(p.norm(p.inner(x))), inner=nn.Sequential(layer()), norm=norm(), act=nn.ReLU()),
          ("parts.norm", "relu"))  # fmt: skip


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_padding_modes(padding_mode: str) -> None:
    check(nn.Sequential(layer(padding_mode=padding_mode), norm()), ("1",))


def test_modules_keep_their_classes_where_they_can() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.act = layer(), norm(), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norm(self.conv(x)))

    fused = check(nn.Sequential(Block(), Block()), ("0.norm", "silu"), ("1.norm", "silu"))
    assert all(isinstance(block, Block) for block in fused)


# What stays.


def test_a_second_user_keeps_it() -> None:
    def forward(p: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = p.conv(x)
        return p.norm(y), y

    kept(Net(forward, conv=layer(), norm=norm()), "is used 2 times")

    def changed_in_place(p: Any, x: Tensor) -> Tensor:
        y = p.conv(x)
        y.add_(1)
        return p.norm(y)

    kept(Net(changed_in_place, conv=layer(), norm=norm()), "is used 2 times")
    kept(Net(lambda p, x: p.conv(x), conv=layer()), "the end of Net.forward")
    y_and_y = Net(lambda p, x: torch.add(*(2 * [p.conv(x)])), conv=layer())
    kept(y_and_y, "is followed by add")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: nn.Sequential(layer(), norm(track_running_stats=False)), "has no running statistics"),
        (lambda: nn.Sequential(layer(), nn.InstanceNorm2d(CHANNELS)), "is followed by 1 (InstanceNorm2d)"),
        (lambda: nn.Sequential(layer(), nn.LeakyReLU()), "is followed by 1 (LeakyReLU)"),
        (lambda: nn.Sequential(layer(), nn.MaxPool2d(2), nn.ReLU()), "is followed by 1 (MaxPool2d)"),
        (lambda: Net(lambda p, x: p.conv(x) + 1, conv=layer()), "is followed by add"),
        (lambda: Net(lambda p, x: torch.add(p.conv(x), x, alpha=2), conv=layer()), "is followed by add"),
        (lambda: Net(lambda p, x: p.conv(x) * x, conv=layer()), "is followed by mul"),
        (lambda: Net(lambda p, x: x - p.conv(x), conv=layer()), "is followed by sub"),
    ],
    ids=range(8),
)  # fmt: skip
def test_other_followers_keep_it(model: Callable[[], nn.Module], reason: str) -> None:
    kept(model(), reason)


def test_norms_that_are_no_affine_map_keep_it() -> None:
    class Own(nn.BatchNorm2d):
        pass

    kept(nn.Sequential(layer(), Own(CHANNELS)), "a subclass of a batch norm")
    model = nn.Sequential(layer(), norm()).eval()
    model[1].train()
    assert "is in training mode" in fusion(model).kept[0].reason
    assert not layers(fuse(model))
    model = nn.Sequential(layer(), norm().double()).eval()
    assert "is in torch.float64, the convolution in torch.float32" in fusion(model).kept[0].reason


@pytest.mark.parametrize("place", ["conv", "norm", "activation"])
def test_hooks_keep_it(place: str) -> None:
    seen: list[Tensor] = []
    parts = nn.ModuleDict({"conv": layer(), "norm": norm(), "activation": nn.ReLU()})
    parts[place].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model = nn.Sequential(*parts.values()).eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
        got = fuse(model)(x)
    torch.testing.assert_close(got, expected)
    assert len(seen) == 2
    torch.testing.assert_close(*seen)
    assert len(layers(fuse(model))) == (0 if place == "conv" else 0 if place == "norm" else 1)


def test_a_hook_around_a_layer_still_sees_its_result() -> None:
    seen: list[Tensor] = []
    inner = nn.Sequential(layer())
    inner.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model = nn.Sequential(inner, norm()).eval()
    kept(model, "the end of Sequential.forward")
    torch.testing.assert_close(seen[0], seen[1]) if len(seen) > 1 else pytest.fail("not called")
    inner = Net(lambda p, x: F.relu(p.norm(p.conv(x))), conv=layer(), norm=norm())
    inner.register_forward_hook(lambda module, inputs, output: seen.append(output))
    kept(nn.Sequential(inner), "is called by Net.forward, which has hooks")


def test_different_followers_keep_a_shared_layer() -> None:
    model = Net(lambda p, x: p.norm(p.conv(p.conv(x))), conv=layer(), norm=norm())
    kept(model, "called 2 times")
    model = Net(lambda p, x: p.norm2(p.conv(p.norm(p.conv(x)))), conv=layer(), norm=norm(), norm2=norm())
    kept(model, "called 2 times")
    shared = layer()
    one, two = (Net(lambda p, x: F.relu(p.conv(x)), conv=shared) for _ in range(2))
    kept(nn.Sequential(one, two), "called 2 times")


def test_a_sum_written_over_something_that_is_used_elsewhere_keeps_it() -> None:
    def forward(p: Any, x: Tensor) -> Tensor:
        doubled = x * 2
        view = doubled.view_as(doubled)
        view += p.conv(x)
        return doubled

    kept(Net(forward, conv=layer()), "is added in place to view_as, which may be used elsewhere")


def test_an_input_changed_in_between_keeps_the_sum() -> None:
    def forward(p: Any, x: Tensor) -> Tensor:
        x = x * 2
        y = p.norm(p.conv(x))
        x.mul_(3)
        return y + x

    check(Net(forward, conv=layer(), norm=norm()), ("parts.norm",))


def test_optional_arguments_keep_it() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = layer(), norm()

        def forward(self, x: Tensor, before_norm: bool = False) -> Tensor:
            y = self.conv(x)
            return y if before_norm else self.norm(y)

    kept(Optional(), "optional arguments may change what follows")
    kept(nn.Sequential(Optional()), "optional arguments may change what follows")


def test_subclasses_and_unhandled_branch_norms_keep_it() -> None:
    class Own(SPConv2d):
        pass

    kept(nn.Sequential(Own(CHANNELS, CHANNELS, 3), nn.ReLU()), "a subclass of SPConv2d")
    model = stirred(layer(branch_norm=True))
    model.norm_redundant = nn.GroupNorm(2, CHANNELS)
    kept(nn.Sequential(model, nn.ReLU()), "norms in its branches")


# Networks that cannot be traced as a whole.


class Dynamic(nn.Module):
    """Control flow that depends on values, around parts that have none."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(layer(), norm(), nn.ReLU())
        self.block = Net(lambda p, x: F.relu(p.norm(p.conv(x)) + x), conv=layer(), norm=norm())
        self.last = layer()

    def forward(self, x: Tensor) -> Tensor:
        y = self.backbone(x)
        for _ in range(int(y.mean().abs() < 100) + 1):
            y = self.block(y)
        return F.relu(self.last(y))


def test_parts_of_what_cannot_be_traced_are_fused() -> None:
    for model in (Dynamic(), nn.Sequential(Dynamic(), layer(), norm())):
        prefix = "" if isinstance(model, Dynamic) else "0."
        parts = [
            (f"{prefix}backbone.1", "relu"),
            (f"{prefix}block.parts.norm", "residual", "relu"),
            *([("2",)] if prefix else []),
        ]
        fused = check(model, *parts)
        assert isinstance(fused if isinstance(model, Dynamic) else fused[0], Dynamic)
        assert "is not called in any forward that can be traced" in fusion(model).kept[0].reason


def test_a_layer_shared_by_parts_that_are_traced_separately_stays() -> None:
    model = Dynamic()
    model.block.parts["conv"] = model.backbone[0]
    found = fusion(model.eval())
    assert found.fused == ()
    assert "is shared by parts that are traced separately" in found.kept[0].reason


def test_tracing_leaves_no_symbol_behind() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = layer(), norm()
            self.last: Any = None
            self.register_buffer("kept", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.kept = x
            return self.norm(self.conv(x))

    fused = fuse(nn.Sequential(Remembers()).eval())
    assert fused[0].last is None
    assert torch.equal(fused[0].kept, torch.zeros(1))


@pytest.fixture
def torchvision() -> ModuleType:
    """Not beside every PyTorch: it must be the one built for it."""
    return pytest.importorskip("torchvision")


def test_detector_with_a_fused_backbone(torchvision: ModuleType) -> None:
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, box_score_thresh=0.0, box_detections_per_img=5
    )
    convert(model, include="*fpn*")
    found = fusion(model.eval())
    assert len(found.fused) + len(found.kept) == 2
    picture = [torch.rand(3, 80, 96)]
    with torch.no_grad():
        for key, value in model(picture)[0].items():
            torch.testing.assert_close(fuse(model)(picture)[0][key], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("resnet18", 16),
        ("resnet50", 16),
        ("densenet121", 0),
        ("vgg11_bn", 7),
    ],
)
def test_networks_of_torchvision(torchvision: ModuleType, name: str, folded: int) -> None:
    with torch.device("meta"):
        model = convert(getattr(torchvision.models, name)(weights=None)).eval()
    found = fusion(model)
    assert len(found.fused) == folded, str(found)
    assert all(fold.folded[-1] == "relu" for fold in found.fused)


def test_resnet18(torchvision: ModuleType) -> None:
    model = stirred(convert(torchvision.models.resnet18(weights=None, num_classes=10))).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.abs_().add_(0.5)
    fused = fuse(model)
    x = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert_within_budget("logits", fused(x), model(x), exact)
        assert_within_budget("logits", fuse(copy.deepcopy(model).double())(x.double()), exact, exact)
    assert "norm=True, residual=True, activation='relu'" in repr(fused.layer1[0].conv2)
    assert sum(isinstance(m, SPConv2d) for m in fused.modules()) == 0


# What a fused network is.


def fused_block() -> tuple[nn.Module, nn.Module, Tensor]:
    model = nn.Sequential(
        layer(), norm(), nn.ReLU(), Net(block_forward, conv=stirred(layer(branch_norm=True)), norm=norm())
    ).eval()
    return model, fuse(model), images()


def block_forward(p: Any, x: Tensor) -> Tensor:
    return F.silu(p.norm(p.conv(x)) + x)


def test_original_stays_trainable() -> None:
    model, fused, x = fused_block()
    assert not any(isinstance(module, FusedSPConv2d) for module in model.modules())
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert list(fused.parameters()) == []


def test_training_a_fused_network_is_refused() -> None:
    _, fused, x = fused_block()
    with pytest.raises(ValueError, match="mode must be False for a fused layer, which cannot be trained"):
        fused.train()
    fused.eval()
    with pytest.raises(ValueError, match="x must not require gradients, which spconv2d_inference does not have"):
        fused(x.requires_grad_())
    with torch.no_grad():
        fused(x)


def test_a_network_in_training_mode_is_refused_and_left_alone() -> None:
    model, _, _ = fused_block()
    before = copy.deepcopy(model.state_dict())
    for part, where in ((model, "it"), (model[0], "its 0"), (model[3], "its 3")):
        part.train()
        with pytest.raises(ValueError, match=f"model must be in eval mode, but {where} is in training mode"):
            fuse(model)
        model.eval()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert isinstance(model[0], SPConv2d)


def test_a_report_that_raises_leaves_everything_as_it_was() -> None:
    model, _, _ = fused_block()

    def report(found: Fusion) -> None:
        raise RuntimeError(str(found))

    with pytest.raises(RuntimeError, match="2 of 2 SPConv layers are fused"):
        fuse(model, report=report)
    assert isinstance(model[0], SPConv2d)


@pytest.mark.parametrize("argument", [None, torch.zeros(1), "model"])
def test_what_is_no_model_is_refused(argument: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got"):
        fuse(argument)


def test_compiled_networks_are_refused() -> None:
    model, _, _ = fused_block()
    with pytest.raises(ValueError, match="model must not be compiled yet"):
        fuse(torch.compile(model))
    with pytest.raises(TypeError, match="report must be callable or None"):
        fuse(model, report=1)


def test_copies_pickles_and_state_dicts() -> None:
    model, fused, x = fused_block()
    with torch.no_grad():
        expected = fused(x)
        assert torch.equal(copy.deepcopy(fused)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(fused))(x), expected)
        file = io.BytesIO()
        torch.save(fused.state_dict(), file)
        file.seek(0)
        other = fuse(stirred(model))
        assert not torch.equal(other(x), expected)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(x), expected)


def test_moves_between_dtypes() -> None:
    model, fused, x = fused_block()
    with torch.no_grad():
        half = fused.bfloat16()(x.bfloat16())
        exact = model.bfloat16().double()(x.bfloat16().double())
    assert half.dtype == torch.bfloat16
    assert (half - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    model, fused, x = fused_block()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        got, expected = fused(x), model(x)
    assert got.dtype == expected.dtype
    with torch.no_grad():
        assert_within_budget("y", got.to(dtype), expected.to(dtype), copy.deepcopy(model).double()(x.double()))


def test_compiles_whole() -> None:
    _, fused, x = fused_block()
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), fused(x))


def test_exports_with_any_batch() -> None:
    _, fused, x = fused_block()
    with torch.no_grad():
        program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        other = images(batch=5)
        torch.testing.assert_close(program.module()(other), fused(other))


def test_reports_read_well(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(layer(), norm(), nn.ReLU(), layer(), nn.MaxPool2d(2)).eval()
    fuse(model, report=print)
    assert capsys.readouterr().out == (
        "1 of 2 SPConv layers are fused\n  0: 1, relu\nthe others stay:\n  3: nothing; is followed by 4 (MaxPool2d)\n"
    )
    assert repr(fuse(model)[0]) == (
        "FusedSPConv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2, alpha=0.5, norm=True, "
        "activation='relu')"
    )


# What a forward does beside its layers.


def two_sums(p: Any, x: Tensor) -> Tensor:
    x = F.relu(p.one(x) + x)
    return F.relu(p.two(x) + x)


def side_by_side(p: Any, x: Tensor) -> Tensor:
    return F.relu(p.two(x) + F.relu(p.one(x)))


def shared_in_a_loop(p: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = F.relu(p.one(x) + x)
    return x


@pytest.mark.parametrize(
    ("forward", "folded"),
    [
        (two_sums, [("residual", "relu"), ("residual", "relu")]),
        (side_by_side, [("relu",), ("residual", "relu")]),
        (shared_in_a_loop, [("residual", "relu")]),
    ],
)
def test_a_residual_may_be_what_another_layer_computes(
    forward: Callable[[Any, Tensor], Tensor], folded: list[tuple[str, ...]]
) -> None:
    parts = {"one": layer()} if forward is shared_in_a_loop else {"one": layer(), "two": layer()}
    check(Net(forward, **parts), *folded)


@pytest.mark.parametrize("make", [lambda: torch.tensor([0.5]), lambda: torch.rand(())])
def test_a_forward_that_makes_a_tensor_is_not_rewritten(make: Callable[[], Tensor]) -> None:
    """Traced it would be a constant, even a random one."""

    def forward(p: Any, x: Tensor) -> Tensor:
        x = x - make()
        return F.relu(p.conv(x) + x)

    model = Net(forward, conv=layer()).eval()
    found = fusion(model)
    assert "it makes a tensor" in found.kept[0].reason
    fuse(model, plain_norms=True)(images())


def seen_before(p: Any, x: Tensor) -> Any:
    target = p.plain(x)
    view = target[:, :4]
    target += p.conv(x)
    return F.relu(target), view * 2


def detached_before(p: Any, x: Tensor) -> Any:
    target = p.plain(x)
    alias = target.detach()
    y = p.conv(alias)
    target += y
    return F.relu(target) + alias


@pytest.mark.parametrize("forward", [seen_before, detached_before])
def test_a_sum_in_place_may_be_seen_through_a_view(forward: Callable[[Any, Tensor], Any]) -> None:
    kept(Net(forward, conv=layer(), plain=nn.Conv2d(CHANNELS, CHANNELS, 1)), "is added in place to")


def test_what_is_added_may_be_a_number() -> None:
    def forward(p: Any, x: Tensor) -> Tensor:
        return F.relu(p.conv(x) + x.size(1) / 10)

    check(Net(forward, conv=layer()), ("residual", "relu"))


def test_parameters_that_a_forward_reads_stay() -> None:
    def reads_norm(p: Any, x: Tensor) -> Any:
        return F.relu(p.norm(p.conv(x))) + p.norm.weight.abs().sum()

    def reads_layer(p: Any, x: Tensor) -> Any:
        return F.relu(p.norm(p.conv(x))) + p.conv.weight_pwc.abs().sum()

    for forward in (reads_norm, reads_layer):
        for alpha in (0.5, 1.0):
            kept(Net(forward, conv=layer(alpha=alpha), norm=norm()), "a forward reads itself")


class Branch(nn.Module):
    """Of two layers, of which one folds what follows it here, and the other what follows the module."""

    def __init__(self, *, normed: bool) -> None:
        super().__init__()
        self.one, self.two = layer(), layer()
        self.norm = norm() if normed else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(F.relu(y + x if self.norm is None else self.norm(y)))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_what_follows_inside_and_outside_a_module(normed: bool, depth: int) -> None:
    def forward(p: Any, x: Tensor) -> Tensor:
        return F.relu(p.norm(p.branch(x)) + x)

    model: nn.Module = Branch(normed=normed)
    for _ in range(depth):
        model = Net(forward, branch=model, norm=norm())
    model = model.eval()
    fused, x = fuse(model), images()
    assert len(layers(fused)) == 2
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_an_inverted_mask_is_traced() -> None:
    check(Net(lambda p, x: F.relu(p.norm(p.conv(x)) * ~(x > 0)), conv=layer(), norm=norm()), ("parts.norm",))


@pytest.mark.parametrize("place", ["conv", "norm", "activation"])
@pytest.mark.parametrize(
    "register", ["register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"]
)
def test_every_kind_of_hook_keeps_it(register: str, place: str) -> None:
    parts = nn.ModuleDict({"conv": layer(), "norm": norm(), "activation": nn.ReLU()})
    seen: list[str] = []
    getattr(parts[place], register)(lambda *_: seen.append(place))
    fused = fuse(nn.Sequential(*parts.values()).eval())
    assert len(layers(fused)) == (1 if place == "activation" else 0)
    if "forward" in register:
        with torch.no_grad():
            fused(images())
        assert seen == [place]


@pytest.mark.parametrize("place", ["conv", "norm", "activation"])
def test_a_forward_of_its_own_keeps_it(place: str) -> None:
    parts = nn.ModuleDict({"conv": layer(), "norm": norm(), "activation": nn.ReLU()})
    parts[place].forward = lambda x: 3 * x
    model = nn.Sequential(*parts.values()).eval()
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(fuse(model)(x), model(x))


@pytest.mark.parametrize("features", [1, CHANNELS // 2])
def test_a_norm_of_other_channels_keeps_it(features: int) -> None:
    model = nn.Sequential(layer(), nn.BatchNorm2d(features)).eval()
    assert f"has {features} channels, not {CHANNELS}" in fusion(model).kept[0].reason


def written_out(p: Any, x: Tensor) -> Any:
    target = x * 2
    total = torch.add(x, x, out=target)
    total += p.conv(x)
    return F.relu(total), target * 1


def seen_after(p: Any, x: Tensor) -> Any:
    target = p.plain(x)
    alias = target
    target += p.conv(x)
    return F.relu(target) + alias * 1


@pytest.mark.parametrize("forward", [written_out, seen_after])
def test_a_sum_in_place_may_be_read_by_another_name(forward: Callable[[Any, Tensor], Any]) -> None:
    kept(Net(forward, conv=layer(), plain=nn.Conv2d(CHANNELS, CHANNELS, 1)), "is added in place to")


def somebody_s(x: Tensor) -> Tensor:
    return x.mul_(2)


torch.fx.wrap("somebody_s")


@pytest.mark.parametrize(
    "change",
    [
        lambda p, x: torch.mul(x, 3, out=x),
        lambda p, x: F.leaky_relu(x, 0.1, inplace=True),
        lambda p, x: p.act(x),
        lambda p, x: somebody_s(x),
    ],
)
def test_an_input_changed_in_any_way_keeps_the_sum(change: Callable[[Any, Tensor], Tensor]) -> None:
    def forward(p: Any, x: Tensor) -> Tensor:
        x = x * 2
        y = p.norm(p.conv(x))
        change(p, x)
        return y + x

    check(Net(forward, conv=layer(), norm=norm(), act=nn.LeakyReLU(inplace=True)), ("parts.norm",))


class Apart(nn.Module):
    """Calls its parts one by one, which cannot be traced."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts[: int(x.abs().sum() > 0) * len(self.parts)]:
            x = part(x)
        return x


@pytest.mark.parametrize("first", [layer, lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)], ids=["spconv", "plain"])
def test_a_norm_shared_by_parts_traced_separately_stays(first: Callable[[], nn.Module]) -> None:
    shared = norm()
    model = Apart(nn.Sequential(first(), shared), nn.Sequential(nn.ReLU(), shared)).eval()
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(fuse(model, plain_norms=True)(x), model(x))


def test_buffers_that_a_forward_reads_stay() -> None:
    def forward(p: Any, x: Tensor) -> Tensor:
        return p.act(p.norm(p.conv(x))).sum() + (x.mean((2, 3)) * p.norm.running_var).sum()

    kept(Net(forward, conv=layer(), norm=norm(), act=nn.ReLU()), "a forward reads itself")


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_uneven_padding_modes(padding_mode: str) -> None:
    conv = SPConv2d(CHANNELS, CHANNELS, (3, 5), padding=(1, 2), padding_mode=padding_mode)
    check(nn.Sequential(conv, norm(), nn.ReLU()), ("1", "relu"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_branch_norms_with_and_without_a_bias(alpha: float, bias: bool) -> None:
    def conv() -> SPConv2d:
        return stirred(layer(alpha=alpha, branch_norm=True, bias=bias))

    check(nn.Sequential(conv(), norm(), nn.ReLU()), ("branch norms", "1", "relu"))
    check(nn.Sequential(conv(), nn.MaxPool2d(2)), ("branch norms",))


def test_a_fused_layer_is_a_copy() -> None:
    conv = layer().eval()
    fused, x = FusedSPConv2d(conv), images()
    with torch.no_grad():
        before = fused(x)
        for parameter in conv.parameters():
            parameter.zero_()
        assert torch.equal(fused(x), before)


def test_a_float32_residual_under_autocast() -> None:
    model = Net(lambda p, x: F.relu(p.norm(p.conv(x)) + x), conv=layer(), norm=norm()).eval()
    x = images()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, expected = fuse(model)(x), model(x)
    assert got.dtype == expected.dtype == torch.float32
