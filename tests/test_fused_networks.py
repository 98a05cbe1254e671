"""What a fused network is: a copy for inference, to compile, export, save and move."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_within_budget
from fuse_cases import Net, images, layer, norm, stirred
from torch import Tensor, nn

from spconv_triton import SPConv2d, fuse
from spconv_triton.fused import FusedSPConv2d
from spconv_triton.fusing import Fusion


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


def test_a_buffer_may_be_computed() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    fused, x = FusedSPConv2d(SPConv2d(8, 8, 3).eval()), torch.randn(1, 8, 5, 5)
    twin = copy.deepcopy(fused)
    twin.weight_gwc.mul_(2)
    fused(x)  # which would remember the weights that there were
    nn.utils.parametrize.register_parametrization(fused, "weight_gwc", Doubled())
    assert torch.equal(fused(x), twin(x))
