"""fuse: what stays, and the reason that it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuse_cases import CHANNELS, Net, check, fusion, images, kept, layer, layers, norm, stirred
from torch import Tensor, nn

from spconv_triton import SPConv2d, fuse


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


def test_parameters_that_a_forward_reads_stay() -> None:
    def reads_norm(p: Any, x: Tensor) -> Any:
        return F.relu(p.norm(p.conv(x))) + p.norm.weight.abs().sum()

    def reads_layer(p: Any, x: Tensor) -> Any:
        return F.relu(p.norm(p.conv(x))) + p.conv.weight_pwc.abs().sum()

    for forward in (reads_norm, reads_layer):
        for alpha in (0.5, 1.0):
            kept(Net(forward, conv=layer(alpha=alpha), norm=norm()), "a forward reads itself")


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


@pytest.mark.parametrize("forward", [seen_before, detached_before, written_out, seen_after])
def test_a_sum_in_place_may_be_read_through_a_view_or_by_another_name(forward: Callable[[Any, Tensor], Any]) -> None:
    kept(Net(forward, conv=layer(), plain=nn.Conv2d(CHANNELS, CHANNELS, 1)), "is added in place to")


def somebody_s(x: Tensor) -> Tensor:
    return x.mul_(2)


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


def test_buffers_that_a_forward_reads_stay() -> None:
    def forward(p: Any, x: Tensor) -> Tensor:
        return p.act(p.norm(p.conv(x))).sum() + (x.mean((2, 3)) * p.norm.running_var).sum()

    kept(Net(forward, conv=layer(), norm=norm(), act=nn.ReLU()), "a forward reads itself")
