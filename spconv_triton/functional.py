"""SPConv as functions: check the arguments, choose a backend, call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .autocast import cast, cast_halves, promote
from .checks import (
    check_alike,
    check_bias,
    check_epilogue,
    check_eps,
    check_fusion,
    check_input,
    check_kernel_weight,
    check_no_gradients,
    check_norm,
    check_pointwise_weight,
    check_redundant,
    check_representative,
    check_window,
    shape,
)
from .dispatch import choose
from .epilogue import NOTHING, Epilogue
from .geometry import Geometry, IntPair, resolve
from .layout import memory_format
from .native import batch_norm, branches, onepass
from .native.inference import Inference
from .native.onepass import Arguments, Memory

__all__ = [
    "gap_softmax_fusion",
    "redundant_branch",
    "representative_branch",
    "spconv2d",
    "spconv2d_batch_norm",
    "spconv2d_inference",
]

Window = tuple[IntPair, IntPair | str, IntPair, int]
"""Stride, padding, dilation and groups."""


def representative_branch(
    x3: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    *,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 2,
    backend: str = "auto",
) -> Tensor:
    """U3 = GWC(x3) + PWC(x3): the k x k group-wise and the 1 x 1 convolution of the representative channels, summed.

    At a stride the 1 x 1 convolution reads the average over the valid pixels of a stride-sized window.

    Args:
        x3: [N, alpha L, H, W]; float32, bfloat16, float16 (any backend) or float64 (native, reference).
        weight_gwc: [M, alpha L / G, k, k], k odd, dtype of ``x3``.
        weight_pwc: [M, alpha L, 1, 1], dtype of ``x3``.
        stride, padding, dilation: pixels, an int or (vertical, horizontal); padding also ``"same"``, ``"valid"``.
        groups: G; divides alpha L and M.
        backend: ``"auto"``, ``"triton"``, ``"native"`` (ATen) or ``"reference"``.

    Returns:
        U3, [N, M, H_out, W_out], dtype and memory format of ``x3``.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it, what came and what is legal.

    Source: Zhang et al., IJCAI 2020, section 3.3.
    """
    check_input("x3", x3)
    x3, weight_gwc, weight_pwc = cast(x3, weight_gwc, weight_pwc)
    check_kernel_weight(weight_gwc)
    geometry = resolve(tuple(weight_gwc.shape[2:]), stride, padding, dilation, groups)
    check_representative("x3", x3, weight_gwc, weight_pwc, geometry)
    check_pointwise_weight("weight_pwc", weight_pwc, x3.shape[1], "x3")
    chosen = choose(x3, backend)
    if chosen == "triton":
        u3 = ops.representative_branch(x3, weight_gwc, weight_pwc, *geometry[1:])
    elif chosen == "native":
        u3 = branches.representative_branch(x3, weight_gwc, weight_pwc, geometry)
    else:
        u3 = reference.representative_branch(
            x3,
            weight_gwc,
            weight_pwc,
            **geometry.window,
            groups=groups,
        )
    return u3.contiguous(memory_format=memory_format(x3))


def redundant_branch(
    x1: Tensor,
    weight_redundant: Tensor,
    *,
    kernel_size: IntPair,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
) -> Tensor:
    """U1 = PWC'(x1): the 1 x 1 convolution of the redundant channels, at the centre taps of the k x k window.

    At a stride it reads the average over the valid pixels of a stride-sized window, as :func:`representative_branch`.

    Args:
        x1: [N, L - alpha L, H, W], floating point.
        weight_redundant: [M, L - alpha L, 1, 1], dtype of ``x1``.
        kernel_size, stride, padding, dilation: of the layer; they say which pixels the centre taps are.

    Returns:
        U1, [N, M, H_out, W_out]. A 1 x 1 convolution is ATen's on every device, so there is no backend to choose.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it, what came and what is legal.

    Source: Zhang et al., IJCAI 2020, section 3.3.
    """
    check_input("x1", x1)
    x1, weight_redundant = cast(x1, weight_redundant)
    check_alike("weight_redundant", weight_redundant, "x1", x1)
    check_pointwise_weight("weight_redundant", weight_redundant, x1.shape[1], "x1")
    geometry = resolve(kernel_size, stride, padding, dilation, 1)
    check_window("x1", x1, geometry)
    return branches.pointwise(x1, weight_redundant, geometry).contiguous(memory_format=memory_format(x1))


def gap_softmax_fusion(u3: Tensor, u1: Tensor, *, backend: str = "auto") -> Tensor:
    """Y = beta U3 + gamma U1 with beta, gamma = softmax([GAP(U3), GAP(U1)]) per (sample, channel).

    Args:
        u3, u1: [N, M, H, W], one dtype; float32, bfloat16, float16 (any backend) or float64 (native, reference).
        backend: ``"auto"``, ``"triton"``, ``"native"`` (ATen) or ``"reference"``.

    Returns:
        Y, [N, M, H, W], dtype and memory format of ``u3``; statistics and gate are computed in float32 or better.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it, what came and what is legal.

    Source: Zhang et al., IJCAI 2020, section 3.4, equations of the parameter-free fusion.
    """
    u3, u1 = promote(u3, u1)
    check_fusion(u3, u1)
    chosen = choose(u3, backend)
    if chosen == "triton":
        y = ops.gap_softmax_fusion(u3, u1)[0]
    elif chosen == "native":
        y = branches.gap_softmax_fusion(u3, u1)
    else:
        y = reference.gap_softmax_fusion(u3, u1)
    return y.contiguous(memory_format=memory_format(u3))


def spconv2d(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor | None,
    bias: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 2,
    branch_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The SPConv layer: Y = beta U3 + gamma U1 + bias.

    The representative channels x3 = x[:, :alpha L] go through :func:`representative_branch`, the redundant ones
    through a 1 x 1 convolution, and :func:`gap_softmax_fusion` mixes the two. alpha L is ``weight_pwc.shape[1]``.
    Under ``torch.autocast`` the inputs are cast to its dtype, as for ``torch.nn.functional.conv2d``.

    Args:
        x: [N, L, H, W]; float32, bfloat16, float16 (any backend) or float64 (native, reference). N may be 0.
        weight_gwc: [M, alpha L / G, k, k], k odd, dtype of ``x``.
        weight_pwc: [M, alpha L, 1, 1], dtype of ``x``.
        weight_redundant: [M, L - alpha L, 1, 1], dtype of ``x``; None where alpha = 1, and then Y = U3 + bias.
        bias: [M], dtype of ``x``; added after the gate.
        stride, padding, dilation: pixels, an int or (vertical, horizontal); padding also ``"same"``, ``"valid"``.
        groups: G; divides alpha L and M.
        branch_bias: [2, M], dtype of ``x`` or float32; added to U3 and U1 before the gate (a folded branch norm).
        backend: ``"auto"``, ``"triton"``, ``"native"`` (ATen) or ``"reference"``.

    Returns:
        Y, [N, M, H_out, W_out], dtype and memory format of ``x``.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it, what came and what is legal.

    Source: Zhang et al., IJCAI 2020, sections 3.2 to 3.4.
    """
    arguments = (x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias)
    return _spconv2d(arguments, (stride, padding, dilation, groups), backend, _check_layer)


def layer_forward(arguments: Arguments, window: Window, backend: str, inference: Inference | None = None) -> Tensor:
    """:func:`spconv2d` for a layer that is called again and again: what was found to fit fits again, unchecked.

    Args:
        arguments, window, backend: as of :func:`spconv2d`.
        inference: what the layer remembers from one inference to the next.
    """
    memory = None
    if inference is not None:
        memory = Memory(inference, (window, backend))
        y = onepass.recall(arguments, NOTHING, memory)
        if y is not None:
            return y
    check = _check_layer if torch.compiler.is_compiling() else _recall
    return _spconv2d(arguments, window, backend, check, memory)


FOUND = 4096
"""How many kinds of arguments are remembered."""

_found: dict[Any, Geometry] = {}


def _recall(arguments: Arguments, window: Window) -> Geometry:
    """:func:`_check_layer`, which looks at nothing but shapes, dtypes, devices and layouts, once for each of them."""
    try:
        kind = (window, *(t if t is None else (t.shape, t.dtype, t.device, t.layout) for t in arguments))
        geometry = _found.get(kind)
    except (AttributeError, RuntimeError, TypeError):  # no tensor, or a nested one; symbols; a window of lists
        return _check_layer(arguments, window)
    if geometry is None:
        geometry = _check_layer(arguments, window)
        if len(_found) >= FOUND:
            _found.clear()
        _found[kind] = geometry
    return geometry


def _spconv2d(
    arguments: Arguments,
    window: Window,
    backend: str,
    check: Callable[[Arguments, Window], Geometry],
    memory: Memory | None = None,
) -> Tensor:
    x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias = arguments
    check_input("x", x)
    x, weight_gwc, weight_pwc, weight_redundant, bias = cast(x, weight_gwc, weight_pwc, weight_redundant, bias)
    (branch_bias,) = cast_halves(x, branch_bias)
    geometry = check((x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias), window)
    weight_redundant = _or_none(weight_redundant)
    chosen = choose(x, backend)
    if chosen == "reference":
        y = reference.spconv2d(
            x,
            weight_gwc,
            weight_pwc,
            weight_redundant,
            bias,
            **geometry.window,
            groups=geometry.groups,
            branch_bias=branch_bias,
        )
    elif chosen == "native":
        y = onepass.spconv2d(x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias, geometry, memory)
    else:
        y = _on_triton(x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias, geometry)
    return y.contiguous(memory_format=memory_format(x))


def spconv2d_inference(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor | None,
    bias: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 2,
    branch_bias: Tensor | None = None,
    norm_scale: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """The SPConv layer and what follows it: Y = activation(norm_scale (beta U3 + gamma U1) + bias + residual).

    A batch norm on its running statistics, a u + t with a = weight / sqrt(running_var + eps) and
    t = norm's bias - a running_mean, is ``norm_scale`` = a and ``bias`` = t + a (the layer's bias). All of it happens
    before the output is written, in float32 or better; of bfloat16 on a CPU the parts are rounded. There are no
    gradients.

    Args:
        x, weight_gwc, weight_pwc, weight_redundant, stride, padding, dilation, groups, branch_bias, backend: as of
            :func:`spconv2d`.
        bias: [M], dtype of ``x`` or float32.
        norm_scale: [M], dtype of ``x`` or float32.
        residual: [N, M, H_out, W_out], dtype of ``x``.
        activation: ``"none"``, ``"relu"``, ``"relu6"`` or ``"silu"``.

    Returns:
        Y, [N, M, H_out, W_out], dtype and memory format of ``x``.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it, what came and what is legal. Also an
            argument that requires gradients while they are enabled.

    Source: Zhang et al., IJCAI 2020, sections 3.2 to 3.4; batch norm: Ioffe and Szegedy, ICML 2015.
    """
    arguments = (x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias)
    after = Epilogue(norm_scale, residual, activation)
    return inference_forward(arguments, (stride, padding, dilation, groups), after, backend)


def inference_forward(
    arguments: Arguments, window: Window, after: Epilogue, backend: str, inference: Inference | None = None
) -> Tensor:
    """:func:`spconv2d_inference`; ``inference`` is what a layer remembers from one to the next."""
    memory = None
    if inference is not None:
        memory = Memory(inference, (window, backend))
        y = onepass.recall(arguments, after, memory)
        if y is not None:
            return y
    x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias = arguments
    norm_scale, residual, activation = after
    check_input("x", x)
    x, weight_gwc, weight_pwc, weight_redundant, residual = cast(x, weight_gwc, weight_pwc, weight_redundant, residual)
    bias, branch_bias, norm_scale = cast_halves(x, bias, branch_bias, norm_scale)
    geometry = _check_weights(x, weight_gwc, weight_pwc, weight_redundant, branch_bias, window)
    outputs = weight_gwc.shape[0]
    check_bias("bias", bias, (outputs,), x, or_float32=True)
    check_bias("norm_scale", norm_scale, (outputs,), x, or_float32=True)
    check_epilogue(residual, activation, x, (x.shape[0], outputs, *geometry.output_size(x.shape[2], x.shape[3])))
    weight_redundant = _or_none(weight_redundant)
    tensors = {
        "x": x,
        "weight_gwc": weight_gwc,
        "weight_pwc": weight_pwc,
        "weight_redundant": weight_redundant,
        "bias": bias,
        "branch_bias": branch_bias,
        "norm_scale": norm_scale,
        "residual": residual,
    }
    check_no_gradients("spconv2d_inference", tensors)
    after = Epilogue(norm_scale, residual, activation)
    weights = (weight_gwc, weight_pwc, weight_redundant)
    chosen = choose(x, backend)
    if chosen == "native":
        y = onepass.spconv2d_inference(x, *weights, bias, branch_bias, geometry, after, memory)
    elif chosen == "triton" and weight_redundant is not None:
        y = ops.spconv2d_inference(x, *weights, bias, branch_bias, *after, *geometry[1:])
    elif chosen == "triton":
        y = after(_on_triton(x, *weights, None, branch_bias, geometry), bias)
    else:
        y = reference.spconv2d(
            x,
            *weights,
            **geometry.window,
            groups=geometry.groups,
            branch_bias=branch_bias,
        )
        y = after(y, bias)
    return y.contiguous(memory_format=memory_format(x))


def spconv2d_batch_norm(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    bias: Tensor | None = None,
    *,
    norm_representative: tuple[Tensor | None, Tensor | None] = (None, None),
    norm_redundant: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: tuple[float, float] = (1e-5, 1e-5),
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 2,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The SPConv layer with a batch norm on U3 and on U1 before the gate, both normalising by the batch.

    Args:
        x, weight_gwc, weight_pwc, weight_redundant, bias, stride, padding, dilation, groups, backend: as of
            :func:`spconv2d`; there must be redundant channels.
        norm_representative, norm_redundant: weight and bias of either norm, [M], dtype of ``x`` or float32; None for 1
            and 0.
        eps: of either norm, added to its variance.

    Returns:
        Y, [N, M, H_out, W_out], dtype and memory format of ``x``; and, without gradients and in float32 or better, mean
        and variance of the branches over samples and pixels, [2, M] each, the variance by N H_out W_out.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it, what came and what is legal.

    Source: Zhang et al., IJCAI 2020, section 3.4; batch norm: Ioffe and Szegedy, ICML 2015, algorithm 1.
    """
    check_input("x", x)
    x, weight_gwc, weight_pwc, weight_redundant, bias = cast(x, weight_gwc, weight_pwc, weight_redundant, bias)
    geometry = _check_weights(x, weight_gwc, weight_pwc, weight_redundant, None, (stride, padding, dilation, groups))
    if _or_none(weight_redundant) is None:
        raise ValueError("weight_redundant must have at least one input channel, got none, so there is no gate")
    outputs = weight_gwc.shape[0]
    check_bias("bias", bias, (outputs,), x, or_float32=False)
    norm_representative, norm_redundant = (
        cast_halves(x, *norm) if isinstance(norm, (tuple, list)) else norm
        for norm in (norm_representative, norm_redundant)
    )
    for name, norm in (("norm_representative", norm_representative), ("norm_redundant", norm_redundant)):
        check_norm(name, norm, outputs, x)
    check_eps(eps)
    height, width = geometry.output_size(x.shape[2], x.shape[3])
    if x.shape[0] * height * width < 2:
        raise ValueError(f"x must give more than 1 value per channel to normalise, got {shape(x)}")
    weights = (weight_gwc, weight_pwc, weight_redundant)
    norms = (*norm_representative, *norm_redundant)
    chosen = choose(x, backend)
    if chosen == "triton":
        y, *_, statistics = ops.spconv2d_batch_norm(x, *weights, bias, *norms, *eps, *geometry[1:])
        mean, variance, _ = statistics.unbind()
    elif chosen == "native":
        y, mean, variance = batch_norm.spconv2d_batch_norm((x, *weights, bias, *norms), eps, geometry)
    else:
        y, mean, variance = reference.spconv2d_batch_norm(
            x,
            *weights,
            bias,
            norm_representative=norm_representative,
            norm_redundant=norm_redundant,
            eps=eps,
            **geometry.window,
            groups=groups,
        )
    return y.contiguous(memory_format=memory_format(x)), mean, variance


def takes_batch_norm(x: Tensor, backend: str) -> bool:
    """Whether :func:`spconv2d_batch_norm` has a pass of its own for ``x``: on Triton, or eagerly on a CPU in float32 or
    float64."""
    chosen = choose(x, backend)
    return chosen == "triton" or (chosen == "native" and batch_norm.takes(x))


def _check_layer(arguments: Arguments, window: Window) -> Geometry:
    """The window of a layer whose weights and biases fit each other and ``x``."""
    x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias = arguments
    geometry = _check_weights(x, weight_gwc, weight_pwc, weight_redundant, branch_bias, window)
    check_bias("bias", bias, (weight_gwc.shape[0],), x, or_float32=False)
    return geometry


def _check_weights(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor | None,
    branch_bias: Tensor | None,
    window: Window,
) -> Geometry:
    """The window of a layer whose weights fit each other and ``x``."""
    check_kernel_weight(weight_gwc)
    geometry = resolve(tuple(map(int, weight_gwc.shape[2:])), *window)  # make_fx may trace them as symbols
    check_representative("x", x, weight_gwc, weight_pwc, geometry)
    check_redundant(x, weight_redundant, weight_pwc)
    check_bias("branch_bias", branch_bias, (2, weight_gwc.shape[0]), x, or_float32=True)
    return geometry


def _or_none(weight_redundant: Tensor | None) -> Tensor | None:
    """None where there is no redundant channel: alpha = 1."""
    return None if weight_redundant is None or weight_redundant.shape[1] == 0 else weight_redundant


def _on_triton(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    if weight_redundant is not None:
        weights = (weight_gwc, weight_pwc, weight_redundant)
        return ops.spconv2d(x, *weights, bias, branch_bias, *geometry[1:])[0]
    y = ops.representative_branch(x, weight_gwc, weight_pwc, *geometry[1:])
    if branch_bias is not None:
        y = (y + branch_bias[0, :, None, None]).to(x.dtype)
    return y if bias is None else y + bias[:, None, None]
