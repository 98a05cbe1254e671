"""fuse around forwards that cannot be traced: what they only call is fused, what they may reach otherwise stays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuse_cases import fusion, images, layer, layers, norm
from torch import Tensor, fx, nn

from spconv_triton import SPConv2d, fuse
from spconv_triton.fusing.reach import reach_of


class Block(nn.Module):
    """A layer, a norm and a ReLU, of which ``fuse`` makes one where it may."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = layer(bias=False), norm()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))

    def features(self, x: Tensor) -> Tensor:
        return self.conv(x)


def parts_of(block: Any, x: Tensor) -> Tensor:
    """What would change if the norm went into the layer."""
    return block(x) + block.bn(block.conv(x)) + block.conv(x)


class Opaque(nn.Module):
    """Of which no graph can be traced: it asks for the sign of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Block()
        self.stages = nn.ModuleList([nn.ModuleList([Block()]), nn.ModuleList([Block()])])
        self.tail = nn.Sequential(layer(), norm(), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.run(-x if x.flatten()[0] > 0 else x)

    def run(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Calls(Opaque):
    """Only calls, in every way that there is."""

    def run(self, x: Tensor) -> Tensor:
        stem = self.stem
        y = stem(x) if stem is not None and isinstance(self, Opaque) else x
        for i, stage in enumerate(self.stages):
            for (block,) in zip(stage, strict=True):
                y = block(y) if i < len(self.stages) and self.stages else x
        return self.tail.forward(y) + self.stages[-1][0](y)


class CallsByName(Opaque):
    def run(self, x: Tensor) -> Tensor:
        x = getattr(self, "tail")(self.stem(x))  # noqa: B009
        return sum(block(x) for stage in self.stages for block in reversed(stage))


class ReachesIn(Opaque):
    def run(self, x: Tensor) -> Tensor:
        return self.stem(x) + self.stem.bn(self.stem.conv(x)) + self.stem.conv(x)


class CallsAnotherMethod(Opaque):
    def run(self, x: Tensor) -> Tensor:
        return self.stem(x) + self.stem.features(x)


class ReachesFromALoop(Opaque):
    def run(self, x: Tensor) -> Tensor:
        return sum(block(x) + block.conv(x) for stage in self.stages for block in stage)


class ReachesByAName(Opaque):
    def run(self, x: Tensor) -> Tensor:
        block = self.stages[0][0]
        return parts_of(block, x)


class CallsElements(Opaque):
    def run(self, x: Tensor) -> Tensor:
        for part in self.tail:
            x = part(x).sigmoid()
        return x


class CallsASlice(Opaque):
    def run(self, x: Tensor) -> Tensor:
        return self.tail[1:](self.tail[0](x).sigmoid())


class Shifts(Block):
    def run(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) + 1)


class GivesItselfAway(Opaque):
    def run(self, x: Tensor) -> Tensor:
        return parts_of(vars(self)["_modules"]["stem"], x)


class ReachesByText(Opaque):
    def run(self, x: Tensor) -> Tensor:
        name = "st" + "em"
        return parts_of(getattr(self, name), x)


class Mixin:
    stem: Any

    def run(self, x: Tensor) -> Tensor:
        return parts_of(self.stem, x)


class Mixed(Mixin, Opaque):
    pass


class HoldsAMethod(Opaque):
    def __init__(self) -> None:
        super().__init__()
        self.chosen = self.among

    def run(self, x: Tensor) -> Tensor:
        return self.chosen(x)

    def among(self, x: Tensor) -> Tensor:
        return parts_of(self.stem, x)


class Decorated(Opaque):
    @functools.lru_cache(maxsize=1)  # noqa: B019
    def run(self, x: Tensor) -> Tensor:
        return parts_of(self.stem, x)


class OfItsOwnClass(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self[1](self[0](x) * (2 if x.flatten()[0] > 0 else 3)))


class HasTwoNames(Opaque):
    def __init__(self) -> None:
        super().__init__()
        self.other = self.stem

    def run(self, x: Tensor) -> Tensor:
        return self.stem(x) + self.other.conv(x)


class HasASequential(Opaque):
    def __init__(self) -> None:
        super().__init__()
        self.tail = OfItsOwnClass(layer(), norm())

    def run(self, x: Tensor) -> Tensor:
        return self.tail(x)


class AsksForTheType(Opaque):
    def run(self, x: Tensor) -> Tensor:
        x = self.stem(x) if isinstance(self.stem, Block) else x
        return self.tail(x) if isinstance(self.tail[1], nn.BatchNorm2d) and hasattr(self.tail[0], "alpha") else x


REACHES = (
    AsksForTheType,
    ReachesIn,
    CallsAnotherMethod,
    ReachesFromALoop,
    ReachesByAName,
    CallsElements,
    CallsASlice,
    GivesItselfAway,
    ReachesByText,
    Mixed,
    HoldsAMethod,
    Decorated,
    HasASequential,
    HasTwoNames,
)


def assert_the_same(model: nn.Module) -> nn.Module:
    """With any norms folded the results are the model's; the fused model."""
    model.eval()
    x = images()
    with torch.no_grad():
        for sign in (1, -1):
            for plain_norms in (False, True):
                torch.testing.assert_close(fuse(model, plain_norms=plain_norms)(sign * x), model(sign * x))
    return fuse(model)


@pytest.mark.parametrize("make", [Calls, CallsByName])
def test_what_is_only_called_is_fused(make: type[Opaque]) -> None:
    fused = layers(assert_the_same(make()))
    assert set(fused) == {"stem.conv", "stages.0.0.conv", "stages.1.0.conv", "tail.0"}
    assert all(part.has_norm for part in fused.values())


@pytest.mark.parametrize("make", REACHES)
def test_what_may_be_reached_otherwise_stays(make: type[Opaque]) -> None:
    model = make()
    fused = layers(assert_the_same(model))
    assert len(fused) < 4, str(fusion(model))


def test_a_layer_stays_though_the_norm_alone_may_be_reached() -> None:
    class ReadsTheNorm(Opaque):
        def run(self, x: Tensor) -> Tensor:
            return self.stem(x) * self.stem.bn.weight.mean()

    model = ReadsTheNorm()
    assert "stem.conv" not in layers(assert_the_same(model))


def test_a_part_that_a_sibling_reaches_stays() -> None:
    class Sibling(nn.Module):
        def __init__(self, part: Block) -> None:
            super().__init__()
            self.part = part

        def forward(self, x: Tensor) -> Tensor:
            return self.part.conv(x) if x.flatten()[0] > 0 else x

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()
            self.sibling = Sibling(self.block)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) + self.sibling(x)

    assert not layers(assert_the_same(Both()))

    class CallsTheLayer(Sibling):
        def __init__(self, part: Block) -> None:
            super().__init__(part)
            self.part = part.conv

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) if x.flatten()[0] > 0 else x

    model = Both()
    model.sibling = CallsTheLayer(model.block)
    assert not layers(assert_the_same(model))


def hold_in_a_list(model: Any) -> None:
    model.held = [model.block]


def hold_in_a_dictionary(model: Any) -> None:
    model.held = {"a": (model.block.conv,)}


def hold_in_a_partial(model: Any) -> None:
    model.held = functools.partial(F.relu), functools.partial(parts_of, model.block)


def hold_in_a_method(model: Any) -> None:
    model.held = model.block.features


def hold_in_a_closure(model: Any) -> None:
    block = model.block
    model.held = lambda x: parts_of(block, x)


def values(held: Any) -> Iterator[Any]:
    for value in held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else [held]:
        yield from values(value) if isinstance(value, (dict, list, tuple)) else [value]


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize(
    "hold", [hold_in_a_list, hold_in_a_dictionary, hold_in_a_partial, hold_in_a_method, hold_in_a_closure]
)
def test_what_an_attribute_holds_beside_the_tree_stays(hold: Callable[[Any], None], traced: bool) -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()
            hold(self)

        def forward(self, x: Tensor) -> Tensor:
            if not traced and x.flatten()[0] > 0:
                x = -x
            return self.block(x) + sum(value(x) for value in values(self.held))

    assert not layers(assert_the_same(Holds()))


def test_the_report_says_which_attribute_holds_it() -> None:
    model = nn.Sequential(nn.Sequential(Block())).eval()
    model[0].held = [model[0][0].bn]  # type: ignore[assignment]
    assert "is followed by 0.0.bn, which is held by the attribute 0.held too" in str(fusion(model))
    model.held = model[0].held = [model[0]]  # type: ignore[assignment]
    assert layers(fuse(model)) == {}
    del model.held
    assert layers(assert_the_same(model)), "the module itself is around all that it holds"


@pytest.mark.parametrize("within", [False, True])
def test_a_forward_of_an_instance_is_not_that_of_its_class(within: bool) -> None:
    block = Block()
    block.forward = MethodType(lambda self, x: self.bn(self.conv(x) + 1), block)  # type: ignore[method-assign]
    model = nn.Sequential(block, nn.ReLU()) if within else block
    assert not layers(assert_the_same(model))


def test_a_forward_that_replaced_that_of_the_class_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Calls()
    assert "stem" in reach_of(model).called
    monkeypatch.setattr(Calls, "run", lambda self, x: parts_of(self.stem, x))
    assert reach_of(model).called == {}
    assert_the_same(model)


def test_a_count_of_calls_is_no_constant() -> None:
    class Counts(Block):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x = self.conv(x)
            return self.bn(x) if self.calls % 2 else x

    model = Counts().eval()
    fused, x = fuse(model), images()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fused(x), model(x))


def test_hooks_of_every_module_keep_it() -> None:
    model = nn.Sequential(layer(), norm(), nn.ReLU()).eval()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: y + isinstance(module, SPConv2d))
    try:
        assert not layers(assert_the_same(model))
    finally:
        handle.remove()
    assert layers(fuse(model))


def test_a_graph_keeps_its_modes_and_hooks() -> None:
    graph = fx.symbolic_trace(nn.Sequential(nn.Sequential(layer(), norm(), nn.ReLU()))).eval()
    assert not any(module.training for module in fuse(graph).modules())
    assert layers(assert_the_same(graph))
    graph.register_forward_hook(lambda module, args, y: 3 * y)
    assert_the_same(graph)
    outer = nn.Sequential(graph, nn.ReLU())
    assert_the_same(outer)


class Notes(nn.Module):
    seen = 0

    def note(self, *_: Any) -> None:
        self.seen += 1

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_hooks_of_a_copied_graph_are_the_copy_s() -> None:
    graph, notes = fx.symbolic_trace(nn.Sequential(layer(), nn.ReLU())).eval(), Notes().eval()
    graph.register_forward_hook(notes.note)
    fused = fuse(nn.Sequential(graph, notes).eval())
    with torch.no_grad():
        fused(images())
    assert [part.seen for part in fused.modules() if isinstance(part, Notes)] == [1]
    assert notes.seen == 0


def test_a_graph_with_a_forward_of_its_own_is_not_that_graph() -> None:
    graph = fx.symbolic_trace(nn.Sequential(Block()))
    assert {"0.conv", "0.bn"} <= reach_of(graph).called.keys()
    graph.forward = MethodType(lambda self, x: x, graph)
    assert reach_of(graph).called == {}
