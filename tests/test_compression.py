"""SPConv composes with pruning and quantization: the layer's weights are parameters like any others.

The tools are PyTorch's own. torchao 0.18 quantizes the linear layers of a converted network, but its int8 tensors have
no convolution, so an int8 weight here is a parametrization that keeps int8 and computes in floating point.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from spconv_triton import SPConv2d, convert, models, reference

WEIGHTS = ("weight_gwc", "weight_pwc", "weight_redundant")


def make_network() -> nn.Module:
    """In the memory format of a fresh network. PyTorch's pruners by size view weights as vectors, which no weight in
    channels_last allows, an ``nn.Conv2d``'s neither: there they are given ``importance_scores``."""
    return convert(models.resnet20())


def layers_of(network: nn.Module) -> list[SPConv2d]:
    layers = [m for m in network.modules() if isinstance(m, SPConv2d)]
    assert layers
    return layers


def weights_of(network: nn.Module) -> list[tuple[SPConv2d, str]]:
    return [(layer, name) for layer in layers_of(network) for name in WEIGHTS]


def l1(network: nn.Module) -> None:
    for layer, name in weights_of(network):
        prune.l1_unstructured(layer, name, 0.5)


def structured(network: nn.Module) -> None:
    for layer, name in weights_of(network):
        prune.ln_structured(layer, name, 0.25, n=2, dim=0)


def globally(network: nn.Module) -> None:
    prune.global_unstructured(weights_of(network), prune.L1Unstructured, amount=0.6)


PRUNERS = (l1, structured, globally)


def reference_of(layer: SPConv2d, x: Tensor) -> Tensor:
    """What the layer should compute from the weights that it shows, in float64."""
    weights = [getattr(layer, name).detach().double() for name in WEIGHTS]
    window = {"stride": layer.stride, "padding": layer.geometry.padding, "groups": layer.groups}
    bias = None if layer.bias is None else layer.bias.detach().double()
    return reference.spconv2d(x.double(), *weights, bias, **window)


def assert_computes_what_it_shows(layer: SPConv2d) -> None:
    x = torch.randn(2, layer.in_channels, 7, 6).to(memory_format=torch.channels_last)
    y = layer(x)  # first, since the hooks of pruning make the weights
    expected = reference_of(layer, x)
    assert (y.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss = F.cross_entropy(network(torch.randn(4, 3, 12, 12)), torch.randint(10, (4,)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def zeros(layer: SPConv2d, name: str) -> int:
    return int((getattr(layer, name) == 0).sum())


def test_the_smallest_weights_go() -> None:
    network = make_network()
    before = {
        id(layer): {name: getattr(layer, name).detach().clone() for name in WEIGHTS} for layer in layers_of(network)
    }
    l1(network)
    for layer, name in weights_of(network):
        weight, old = getattr(layer, name), before[id(layer)][name]
        assert zeros(layer, name) == round(0.5 * weight.numel())
        assert torch.equal(weight[weight != 0], old[weight != 0])
        assert old[weight == 0].abs().max() <= old[weight != 0].abs().min()
    assert_computes_what_it_shows(layers_of(network)[-1])


def test_weights_in_channels_last_need_their_scores_in_order() -> None:
    network = make_network()
    expected = copy.deepcopy(network)
    l1(expected)
    network.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view size is not compatible"):  # when it goes, so can the scores
        prune.l1_unstructured(nn.Conv2d(16, 16, 3).to(memory_format=torch.channels_last), "weight", 0.5)
    for layer, name in weights_of(network):
        prune.l1_unstructured(layer, name, 0.5, importance_scores=getattr(layer, name).contiguous())
    for (layer, name), (other, _) in zip(weights_of(network), weights_of(expected), strict=True):
        assert torch.equal(getattr(layer, name), getattr(other, name))
        assert layer.get_parameter(f"{name}_orig").is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(network(x.to(memory_format=torch.channels_last)), expected(x), rtol=1e-3, atol=1e-4)


def test_whole_outputs_go() -> None:
    layer = convert(nn.Conv2d(16, 8, 3, padding=1))
    for name in WEIGHTS:
        prune.ln_structured(layer, name, 2, n=2, dim=0)
        gone = getattr(layer, name).flatten(1).abs().sum(1) == 0
        assert gone.sum() == 2
    chosen = torch.tensor([1.0, 0, 1, 1, 1, 0, 1, 1])
    for name in WEIGHTS:
        prune.remove(layer, name)
        mask = chosen[:, None, None, None].expand_as(getattr(layer, name))
        prune.custom_from_mask(layer, name, mask)
    y = layer(torch.randn(2, 16, 5, 6))
    assert torch.equal(y[:, chosen == 0], layer.bias[chosen == 0][None, :, None, None].expand(2, 2, 5, 6))
    assert_computes_what_it_shows(layer)


def test_a_global_share_goes() -> None:
    network = make_network()
    globally(network)
    counts = [(zeros(layer, name), getattr(layer, name).numel()) for layer, name in weights_of(network)]
    gone, total = (sum(column) for column in zip(*counts, strict=True))
    assert gone == round(0.6 * total)
    assert len({round(z / n, 2) for z, n in counts}) > 1, "every weight lost the same share: that is not global"


@pytest.mark.parametrize("pruner", PRUNERS)
def test_training_keeps_zeros(pruner: Callable[[nn.Module], None]) -> None:
    network = make_network()
    pruner(network)
    masks = {(id(layer), name): getattr(layer, name).detach() != 0 for layer, name in weights_of(network)}
    before = {key: value.clone() for key, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for _ in range(2):
        step(network, optimizer)
    network.eval()
    network(torch.randn(1, 3, 12, 12))
    moved = 0
    for layer, name in weights_of(network):
        weight, mask = getattr(layer, name), masks[id(layer), name]
        assert not weight[~mask].any(), f"{name}: what was pruned came back"
        moved += int((weight != 0)[mask].sum() > 0)
    assert moved == len(masks)
    changed = [key for key, value in network.state_dict().items() if not torch.equal(value, before[key])]
    assert {key.rpartition(".")[2] for key in changed} >= {f"{name}_orig" for name in WEIGHTS}
    assert not any(key.endswith("_mask") for key in changed)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_pruning_can_be_made_final(pruner: Callable[[nn.Module], None]) -> None:
    network = make_network()
    keys = list(network.state_dict())
    pruner(network)
    step(network, torch.optim.SGD(network.parameters(), lr=0.05))
    network.eval()
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        expected = network(x)
    for layer, name in weights_of(network):
        prune.remove(layer, name)
        assert isinstance(getattr(layer, name), nn.Parameter)
    assert sorted(network.state_dict()) == sorted(keys)
    assert not any(layer._forward_pre_hooks for layer in layers_of(network))
    other = make_network().eval()
    other.load_state_dict(through_a_file(network.state_dict()), strict=True)
    with torch.no_grad():
        assert torch.equal(network(x), expected)
        assert torch.equal(other(x), expected)


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return torch.load(io.BytesIO(written(state)), weights_only=True)


def written(state: dict[str, Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def test_masks_are_saved_and_moved() -> None:
    network, other = make_network().eval(), make_network().eval()
    l1(network)
    for layer, name in weights_of(other):
        prune.identity(layer, name)
    other.load_state_dict(through_a_file(network.state_dict()), strict=True)
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(other(x), network(x))
        moved = network.double().to(memory_format=torch.contiguous_format)
        moved(x.double())
    for layer, name in weights_of(moved):
        assert getattr(layer, name).dtype == torch.float64
        assert zeros(layer, name) == round(0.5 * getattr(layer, name).numel())


def test_a_pruned_layer_compiles() -> None:
    layer = convert(nn.Conv2d(16, 8, 3, padding=1))
    for name in WEIGHTS:
        prune.l1_unstructured(layer, name, 0.5)
    x = torch.randn(2, 16, 5, 6)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


class Int8(nn.Module):
    """Keeps a weight [M, ...] as int8 with one float32 step per output channel; what the layer sees is step * int8."""

    def forward(self, integers: Tensor, step: Tensor) -> Tensor:
        return integers * step

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        step = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12) / 127
        return (weight / step).round().to(torch.int8), step


def quantize(network: nn.Module) -> nn.Module:
    for layer, name in weights_of(network):
        getattr(layer, name).requires_grad_(False)  # integers have no gradient
        parametrize.register_parametrization(layer, name, Int8())
    return network


def test_int8_weights_are_as_near_as_they_can_be() -> None:
    network = make_network().eval()
    exact = copy.deepcopy(network)
    quantize(network)
    for (layer, name), (original, _) in zip(weights_of(network), weights_of(exact), strict=True):
        weight, old = getattr(layer, name), getattr(original, name)
        half_a_step = old.abs().amax((1, 2, 3), keepdim=True) / 127 / 2
        assert ((weight - old).abs() <= half_a_step * (1 + 1e-4)).all(), name
        assert not torch.equal(weight, old)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [16, 64])
def test_int8_outputs_are_off_by_the_rounding_of_weights(channels: int, stride: int) -> None:
    """Weights U(-b, b) in steps of b / 127 are off by 1 / 127 / 2 of their own size, so is a sum of them, and the gate,
    whose slope is at most 1/4, adds less than as much again."""
    layer = SPConv2d(channels, channels, 3, stride, padding=1, bias=False).eval()
    x = torch.randn(4, channels, 12, 12)
    with torch.no_grad():
        exact = reference_of(layer, x)
        quantize(layer)
        error = (layer(x).double() - exact).norm() / exact.norm()
        assert_computes_what_it_shows(layer)
    assert 0.1 / 127 / 2 < error < 2 / 127 / 2


def test_int8_weights_take_a_quarter_of_the_bytes() -> None:
    network = make_network().eval()
    before = {f"{i}.{name}": getattr(layer, name).detach() for i, (layer, name) in enumerate(weights_of(network))}
    quantize(network)
    state = {key: value for key, value in network.state_dict().items() if "parametrizations.weight_" in key}
    assert {value.dtype for value in state.values()} == {torch.int8, torch.float32}
    integers = sum(value.numel() for value in before.values())
    steps = 4 * sum(len(value) for value in before.values())
    assert sum(value.nbytes for value in state.values()) == integers + steps
    assert sum(value.nbytes for value in before.values()) == 4 * integers
    wide = SPConv2d(256, 256, 3)
    assert len(written(quantize(wide).state_dict())) < 0.27 * len(written(SPConv2d(256, 256, 3).state_dict()))


def test_int8_weights_are_saved() -> None:
    network, other = quantize(make_network().eval()), quantize(make_network().eval())
    other.load_state_dict(through_a_file(network.state_dict()), strict=True)
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        expected = network(x)
        assert torch.equal(other(x), expected)
        for layer, name in weights_of(network):
            parametrize.remove_parametrizations(layer, name)
        assert torch.equal(network(x), expected)
    plain = make_network().eval()
    plain.load_state_dict(network.state_dict(), strict=True)


def test_a_quantized_layer_compiles() -> None:
    layer = quantize(convert(nn.Conv2d(16, 8, 3, padding=1)).eval())
    x = torch.randn(2, 16, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_pruned_and_quantized() -> None:
    """Zeros stay zeros: they are a step times the integer 0."""
    network = make_network().eval()
    l1(network)
    for layer, name in weights_of(network):
        prune.remove(layer, name)
    gone = [getattr(layer, name) == 0 for layer, name in weights_of(network)]
    quantize(network)
    for mask, (layer, name) in zip(gone, weights_of(network), strict=True):
        assert not getattr(layer, name)[mask].any()
        assert mask.sum() == round(0.5 * mask.numel())
    assert network(torch.randn(2, 3, 12, 12)).isfinite().all()
