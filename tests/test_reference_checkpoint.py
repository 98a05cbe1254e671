"""Checkpoints of the layer as published load into ours, which then computes the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_within_budget
from published import PublishedSPConv, as_published
from torch import Tensor, nn

from spconv_triton import SPConv2d, load_reference_checkpoint, models
from spconv_triton.models import Bottleneck, ResNet, SPConvOptions


def small_network(alpha: float = 0.5) -> ResNet:
    """Two stages of one block each, the second at stride 2, named as the published ResNets are."""
    options = SPConvOptions(alpha, 2, True, "auto")
    return ResNet(Bottleneck, (1, 1), (8, 16), nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Identity(), 5, options)


def randomise(network: nn.Module) -> None:
    """Every parameter and statistic away from where it starts, conv1x1.bias far from zero."""
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif name.endswith("conv1x1.bias"):
                tensor.normal_(std=3)
            elif tensor.is_floating_point() and tensor.dim() == 1:
                tensor.normal_()


@pytest.fixture
def published() -> nn.Module:
    network = as_published(small_network())
    randomise(network)
    return network


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_computes_the_same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    same_dtype = theirs(x)
    exact = copy.deepcopy(theirs).double()(x.double())
    assert_within_budget("y", ours(x), same_dtype, exact)


def with_state_dict(state: dict[str, Tensor]) -> dict[str, Any]:
    """As the published training script saves it."""
    return {"epoch": 3, "arch": "resnet50", "state_dict": state, "best_prec1": 76.2, "optimizer": {"state": {}}}


WRAPPED = {
    "bare": lambda state: state,
    "state_dict": with_state_dict,
    "parallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "parallel-state_dict": lambda state: with_state_dict({f"module.{name}": value for name, value in state.items()}),
    "apex": lambda state: with_state_dict({f"module.1.{name}": value for name, value in state.items()}),
}


@pytest.mark.parametrize("form", WRAPPED)
@pytest.mark.parametrize("file", [False, True], ids=["loaded", "file"])
def test_outputs_are_the_published_layers(published: nn.Module, form: str, file: bool, tmp_path: Path) -> None:
    checkpoint: Any = WRAPPED[form](published.state_dict())
    if file:
        torch.save(checkpoint, tmp_path / "model.pth")
        checkpoint = tmp_path / "model.pth"
    ours = small_network().eval()
    assert load_reference_checkpoint(ours, checkpoint) == ([], [], [])
    assert_computes_the_same(ours, published.eval(), torch.randn(2, 3, 12, 8))


def test_training_goes_on_as_the_published_layers_would(published: nn.Module) -> None:
    """The mean of a batch removes conv1x1.bias; the running mean goes on without it."""
    ours = small_network().double()
    load_reference_checkpoint(ours, published.double().state_dict())
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        expected = published(x)
        assert_within_budget("train", ours(x), expected, expected, factor=8)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = published.eval()(x)
    assert_within_budget("eval", ours.eval()(x), expected, expected, factor=8)
    norms = [m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {3}


@pytest.mark.parametrize(("wrap", "prefix"), [(nn.DataParallel, "module."), (torch.compile, "_orig_mod.")])
def test_model_may_be_wrapped(wrap: Any, prefix: str, published: nn.Module) -> None:
    ours = small_network().eval()
    wrapped = wrap(ours)
    load_reference_checkpoint(wrapped, published.state_dict())
    assert_computes_the_same(ours, published.eval(), torch.randn(1, 3, 8, 8))
    state = published.state_dict()
    del state["fc.bias"]
    assert load_reference_checkpoint(wrapped, state, strict=False).missing_keys == [f"{prefix}fc.bias"]


def test_layer_alone() -> None:
    published = PublishedSPConv(16, 12, 2, 0.25)
    randomise(published)
    ours = SPConv2d(16, 12, 3, 2, 1, bias=False, alpha=0.25, branch_norm=True).eval()
    load_reference_checkpoint(ours, published.state_dict())
    assert_computes_the_same(ours, published.eval(), torch.randn(2, 16, 6, 8))


def test_a_sequence_whose_second_part_alone_is_in_the_checkpoint() -> None:
    """Every name begins with "1.", but no wrapper put it there."""
    ours = nn.Sequential(nn.BatchNorm2d(16), SPConv2d(16, 12, 3, 1, 1, bias=False, branch_norm=True)).eval()
    published = PublishedSPConv(16, 12)
    result = load_reference_checkpoint(
        ours, {f"1.{name}": value for name, value in published.state_dict().items()}, strict=False
    )
    assert result.missing_keys == [f"0.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    assert not result.unexpected_keys
    assert_computes_the_same(ours[1], published.eval(), torch.randn(2, 16, 6, 8))


def test_old_checkpoint_without_num_batches_tracked(published: nn.Module) -> None:
    state = {name: value for name, value in published.state_dict().items() if "num_batches" not in name}
    ours = small_network().eval()
    load_reference_checkpoint(ours, state)
    assert_computes_the_same(ours, published.eval(), torch.randn(2, 3, 8, 8))


def test_without_bias_of_the_redundant_convolution(published: nn.Module) -> None:
    with torch.no_grad():
        for module in published.modules():
            if isinstance(module, PublishedSPConv):
                module.conv1x1.bias.zero_()
    state = {name: value for name, value in published.state_dict().items() if not name.endswith("conv1x1.bias")}
    ours = small_network().eval()
    load_reference_checkpoint(ours, state)
    assert_computes_the_same(ours, published.eval(), torch.randn(2, 3, 8, 8))


def test_checkpoint_is_left_as_it_was(published: nn.Module) -> None:
    state = snapshot(published)
    ours = small_network()
    load_reference_checkpoint(ours, published.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in published.state_dict().items())
    ours.load_state_dict(small_network().state_dict())
    assert all(torch.equal(value, state[name]) for name, value in published.state_dict().items())


def spoilt(published: nn.Module) -> dict[str, Tensor]:
    """Two names missing, two too many, and one of another shape."""
    state = dict(published.state_dict())
    del state["layer1.0.conv2.gwc.weight"], state["layer2.0.bn1.running_var"]
    state["layer1.0.conv2.attention.weight"] = torch.zeros(1)
    state["layer3.0.conv2.pwc.weight"] = torch.zeros(1)
    state["layer2.0.conv2.pwc.weight"] = torch.zeros(16, 4, 1, 1)
    return state


def test_everything_that_does_not_fit_is_in_one_error_and_nothing_is_loaded(published: nn.Module) -> None:
    ours = small_network()
    before = snapshot(ours)
    with pytest.raises(ValueError, match="checkpoint must have the parameters of this ResNet") as caught:
        load_reference_checkpoint(ours, spoilt(published))
    assert str(caught.value).splitlines()[1:] == [
        "  no layer1.0.conv2.weight_gwc, [8, 2, 3, 3]",
        "  no layer2.0.bn1.running_var, [16]",
        "  layer1.0.conv2.attention.weight, which it has no place for",
        "  layer3.0.conv2.pwc.weight, which it has no place for",
        "  layer2.0.conv2.pwc.weight as [16, 4, 1, 1] instead of [16, 8, 1, 1]",
    ]
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_not_strict_loads_the_rest(published: nn.Module) -> None:
    ours = small_network()
    before = snapshot(ours)
    result = load_reference_checkpoint(ours, spoilt(published), strict=False)
    assert result.missing_keys == ["layer1.0.conv2.weight_gwc", "layer2.0.bn1.running_var"]
    assert result.unexpected_keys == ["layer1.0.conv2.attention.weight", "layer3.0.conv2.pwc.weight"]
    assert result.mismatched_keys == ["layer2.0.conv2.pwc.weight"]
    kept = {"layer1.0.conv2.weight_gwc", "layer2.0.bn1.running_var", "layer2.0.conv2.weight_pwc"}
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name]) == (name in kept or name.endswith("num_batches_tracked")), name


def test_another_alpha_or_no_norms_do_not_fit(published: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"conv2\.gwc\.weight as \[8, 2, 3, 3\] instead of \[8, 1, 3, 3\]"):
        load_reference_checkpoint(small_network(0.25), published.state_dict())
    plain = SPConv2d(16, 12, 3, padding=1, bias=False)
    with pytest.raises(ValueError, match=r"conv1x1\.bias, which it has no place for"):
        load_reference_checkpoint(plain, PublishedSPConv(16, 12).state_dict())


class Arbitrary:
    """An object that a pickle could run code for."""


def test_what_it_refuses(tmp_path: Path, published: nn.Module) -> None:
    ours = small_network()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        load_reference_checkpoint({}, published.state_dict())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="checkpoint must be a path or a mapping of names to tensors, got int"):
        load_reference_checkpoint(ours, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got epoch \(int\), model \(OrderedDict\)"):
        load_reference_checkpoint(ours, {"epoch": 3, "model": published.state_dict()})
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="checkpoint must be a path or a mapping of names to tensors, got list"):
        load_reference_checkpoint(ours, tmp_path / "list.pth")
    torch.save({"state_dict": published.state_dict(), "extra": Arbitrary()}, tmp_path / "arbitrary.pth")
    with pytest.raises(ValueError, match=r"checkpoint must be readable with weights_only=True, got '.*arbitrary\.pth'"):
        load_reference_checkpoint(ours, str(tmp_path / "arbitrary.pth"))
    with pytest.raises(NotADirectoryError):
        load_reference_checkpoint(ours, tmp_path / "list.pth" / "below")
    with pytest.raises(FileNotFoundError):
        load_reference_checkpoint(ours, tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"mapping of names to tensors, got 1 \(Tensor\)"):
        load_reference_checkpoint(ours, {1: torch.ones(2)})


@pytest.mark.parametrize(
    "unfit", [lambda t: t.to_sparse(), lambda t: t.to("meta"), lambda t: t * 1j], ids=["sparse", "meta", "complex"]
)
def test_tensors_that_no_parameter_can_take_load_nothing(unfit: Any) -> None:
    layer = SPConv2d(8, 6, 3, branch_norm=True, bias=False)
    before = copy.deepcopy(layer.state_dict())
    checkpoint = {"gwc.weight": torch.randn(6, 2, 3, 3), "pwc.weight": unfit(torch.randn(6, 4, 1, 1))}
    with pytest.raises(ValueError, match=r"can be copied into parameters, got pwc\.weight"):
        load_reference_checkpoint(layer, checkpoint, strict=False)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("damage", ["empty", "half", "short", "text", "zeros"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path, published: nn.Module) -> None:
    file = tmp_path / "model.pth"
    torch.save(published.state_dict(), file)
    whole = file.read_bytes()
    damaged = {"empty": b"", "half": whole[: len(whole) // 2], "short": whole[:-200], "text": b"hello world"}
    file.write_bytes(damaged.get(damage, bytes(1000)))
    with pytest.raises(ValueError, match=r"checkpoint must be readable with weights_only=True, got '.*model\.pth': ."):
        load_reference_checkpoint(small_network(), file)


@pytest.mark.parametrize(("alpha", "parameters"), [(1 / 2, 18_345_448), (1 / 4, 16_930_792), (1 / 8, 16_223_464)])
def test_resnet50_has_the_published_parameters_but_the_biases(alpha: float, parameters: int) -> None:
    """Ours counts 16 conv1x1.bias less: 3,776 of the published numbers are biases that a norm removes."""
    with torch.device("meta"):
        ours = models.resnet50(alpha)
        theirs = as_published(ours)
    assert sum(p.numel() for p in theirs.parameters()) == parameters
    assert sum(p.numel() for p in ours.parameters()) == parameters - 3_776
    assert load_reference_checkpoint(ours, theirs.state_dict(), strict=True) == ([], [], [])


def normed_pair() -> tuple[PublishedSPConv, SPConv2d]:
    published = PublishedSPConv(16, 12)
    randomise(published)
    return published, SPConv2d(16, 12, 3, 1, 1, bias=False, branch_norm=True)


def test_half_precision_checkpoint() -> None:
    published, ours = normed_pair()
    state = published.bfloat16().state_dict()
    load_reference_checkpoint(ours, state)
    expected = state["bn2.running_mean"].float() - state["conv1x1.bias"].float()
    assert torch.equal(ours.norm_redundant.running_mean, expected)


def test_of_two_names_the_first_counts() -> None:
    published, ours = normed_pair()
    state = {**published.state_dict(), "weight_pwc": torch.zeros(12, 8, 1, 1)}
    assert load_reference_checkpoint(ours, state, strict=False).unexpected_keys == ["weight_pwc"]
    assert torch.equal(ours.weight_pwc, state["pwc.weight"])


def test_a_bias_of_another_shape_does_not_fit() -> None:
    published, ours = normed_pair()
    with pytest.raises(ValueError, match=r"conv1x1\.bias, which it has no place for"):
        load_reference_checkpoint(ours, {**published.state_dict(), "conv1x1.bias": torch.ones(1)})
