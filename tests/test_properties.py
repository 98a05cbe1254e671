"""What holds for every layer, on ATen, whatever its sizes, dtype and strides, and for every wrong argument."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cases import Case, Inputs, assert_agrees, native
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATING, calls, layers
from torch import Tensor, nn

from spconv_triton import SPConv2d, functional, reference, set_recompute
from spconv_triton.functional import spconv2d


@given(inputs=calls(), recompute=st.booleans())
def test_any_layer_agrees_with_the_reference(inputs: Inputs, recompute: bool) -> None:
    with set_recompute(recompute):
        assert_agrees(native, inputs, perturbations=4)


MISFIT = {
    "stride": [0, -1, 1.5, (1, 2, 3), "same", None, True],
    "padding": [-1, 0.5, (1, -1), "full", None, (0, 0, 0, 0)],
    "dilation": [0, -2, 2.0, (1,), None],
    "groups": [0, -1, 2.0, None, (1, 1), True],
}
"""Values that no layer may have, by argument."""

FITS_NOT = {"weight_gwc": "kernel_size", "weight_pwc": "groups", "weight_redundant": "x"}
"""What is told to be wrong in the place of a weight of another size: its kernel, or whom its channels do not suit."""


@st.composite
def misfits(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A legal call of ``spconv2d`` with one thing wrong: the argument's name, and all arguments."""
    inputs = draw(calls())
    arguments: dict[str, Any] = {**inputs.tensors(), **inputs.window}
    name = draw(st.sampled_from((*MISFIT, *inputs.tensors())))
    value = arguments[name]
    if name in MISFIT:
        wrong = draw(st.sampled_from(MISFIT[name]))
    else:
        wrong = draw(st.sampled_from(("type", "dtype", "device", "rank", "integer", "size")))
        if wrong == "type":
            wrong = value.tolist()
        elif wrong == "dtype":
            others = [dtype for dtype in FLOATING if dtype not in (value.dtype, inputs.x.dtype, torch.float32)]
            wrong = value.to(draw(st.sampled_from(others)))
        elif wrong == "device":
            wrong = value.to("meta")
        elif wrong == "rank":
            wrong = value[None]
        elif wrong == "integer":
            wrong = value.long()
        else:
            # A batch of another size is as good, and so are rows and columns.
            axis = draw(st.integers(1, 1) if name == "x" else st.integers(0, value.dim() - 1))
            wrong = torch.cat((value, value.narrow(axis, 0, 1)), axis)
    return name, {**arguments, name: wrong}


@given(misfit=misfits())
def test_anything_illegal_is_refused_by_name(misfit: tuple[str, dict[str, Any]]) -> None:
    """With a ValueError or TypeError that names the argument, or what it alone no longer fits."""
    name, arguments = misfit
    with pytest.raises((ValueError, TypeError)) as caught:
        spconv2d(**{"weight_redundant": None, **arguments})
    assert type(caught.value) in (ValueError, TypeError)
    message = str(caught.value)
    told = {name, FITS_NOT.get(name, name)}
    assert any(re.search(rf"\b{n}\b", message) for n in told), message
    assert "got" in message or "leaves no output pixel" in message, message


@given(
    layer=layers(largest=2, extra_pixels=2),
    padding_mode=st.sampled_from(("zeros", "circular", "reflect", "replicate")),
    options=st.fixed_dictionaries(
        {}, optional={"alpha": st.floats(0, 1), "groups": st.integers(1, 4), "kernel_size": st.integers(1, 6)}
    ),
)
def test_a_constructed_layer_has_the_output_size_of_conv2d(
    layer: Case, padding_mode: str, options: dict[str, Any]
) -> None:
    """Or is refused, by name, exactly where the documentation says so."""
    channels, outputs = layer.in_channels, layer.out_channels
    arguments: dict[str, Any] = {"kernel_size": layer.kernel_size, "alpha": layer.alpha, **layer.window, **options}
    alpha, groups = arguments.pop("alpha"), arguments.pop("groups")
    representative = int(channels * alpha)
    odd = isinstance(arguments["kernel_size"], tuple) or arguments["kernel_size"] % 2 == 1
    whole = representative >= groups and representative % groups == 0 and outputs % groups == 0
    if not (odd and whole and alpha > 0):
        with pytest.raises(ValueError, match=r"kernel_size|alpha|groups"):
            SPConv2d(channels, outputs, groups=groups, alpha=alpha, padding_mode=padding_mode, **arguments)
        return
    slim = SPConv2d(channels, outputs, groups=groups, alpha=alpha, padding_mode=padding_mode, **arguments)
    dense = nn.Conv2d(channels, outputs, padding_mode=padding_mode, **arguments)
    x = torch.randn(layer.batch, channels, *layer.size)
    try:
        expected = dense(x).shape
    except RuntimeError:  # too small for its window, or for its padding mode
        with pytest.raises((ValueError, RuntimeError)):
            slim(x)
        return
    assert slim(x).shape == expected


def _snapshot(tensors: dict[str, Tensor]) -> dict[str, tuple[int, Tensor]]:
    return {name: (tensor._version, tensor.detach().clone()) for name, tensor in tensors.items()}


@given(inputs=calls(), activation=st.sampled_from(("none", "relu", "relu6", "silu")))
def test_no_argument_is_ever_written_to(inputs: Inputs, activation: str) -> None:
    """Of any function, on ATen and in the reference; forward and backward."""
    x, gwc, pwc, redundant, bias = inputs.positional()
    rest = pwc.shape[1]
    window = dict(inputs.window)
    y = reference.spconv2d(*(t if t is None else t.double() for t in inputs.positional()), **window).to(x.dtype)
    scale = torch.rand(gwc.shape[0])
    extra = {"residual": y.detach().clone(), "norm_scale": scale, "u3": y.detach().clone(), "u1": torch.randn_like(y)}
    held = {**inputs.tensors(), **extra}
    before = _snapshot(held)
    for backend in ("native", "reference"):
        branch = {name: value for name, value in window.items() if name != "groups"}
        results = [
            spconv2d(*inputs.positional(), branch_bias=inputs.branch_bias, backend=backend, **window),
            functional.representative_branch(x[:, :rest], gwc, pwc, backend=backend, **window),
            functional.gap_softmax_fusion(extra["u3"].requires_grad_(), extra["u1"].requires_grad_(), backend=backend),
        ]
        if redundant is not None:
            kernel_size = tuple(gwc.shape[2:])
            results.append(functional.redundant_branch(x[:, rest:], redundant, kernel_size=kernel_size, **branch))
            if y[:, 0].numel() > 1:
                norms = {"norm_representative": (scale, scale.to(x.dtype)), "norm_redundant": (None, scale)}
                results.append(
                    functional.spconv2d_batch_norm(x, gwc, pwc, redundant, bias, backend=backend, **norms, **window)[0]
                )
        with torch.no_grad():
            functional.spconv2d_inference(
                *inputs.positional(),
                branch_bias=inputs.branch_bias,
                residual=extra["residual"],
                norm_scale=scale,
                activation=activation,
                backend=backend,
                **window,
            )
        for result in results:
            grad = torch.randn_like(result)
            kept = _snapshot({"grad": grad})
            result.backward(grad)
            assert kept["grad"][0] == grad._version
            assert torch.equal(kept["grad"][1], grad)
    for name, (version, value) in before.items():
        assert held[name]._version == version, f"{name} was written to"
        assert torch.equal(held[name].detach(), value), f"{name} was written to"
