"""fuse: what folds into a layer, and that results stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuse_cases import CHANNELS, Net, check, images, layer, norm, stirred
from torch import Tensor, nn

from spconv_triton import SPConv2d, fuse
from spconv_triton.fused import FusedSPConv2d

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


def test_what_is_added_may_be_a_number() -> None:
    def forward(p: Any, x: Tensor) -> Tensor:
        return F.relu(p.conv(x) + x.size(1) / 10)

    check(Net(forward, conv=layer()), ("residual", "relu"))


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


class ByKeyword(nn.Module):
    def __init__(self, branch_norm: bool) -> None:
        super().__init__()
        self.conv, self.bn = SPConv2d(8, 8, 3, branch_norm=branch_norm), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(input=x)).relu() if self.bn is not None else self.conv(input=x).tanh()


@pytest.mark.parametrize("branch_norm", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_a_layer_may_be_called_by_keyword(branch_norm: bool, norm: bool) -> None:
    model = ByKeyword(branch_norm).eval()
    if not norm:
        model.bn = None
    fused, x = fuse(model), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
