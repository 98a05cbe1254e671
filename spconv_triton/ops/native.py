"""The layer's ATen path with gradients as an operator: what a compiled layer calls on a CPU.

Traced, its operations would be differentiated anew, and the partitioner would keep U3 and U1, or recompute all of the
forward. As an operator it keeps and does what it does in eager mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .. import native, native_onepass
from ..autocast import without_autocast
from ..flop_formulas import flop_formula
from ..native_backward import gradients
from ..native_weights import for_one_call
from ..registration import NAMESPACE
from .common import forward_flops, geometry_of, layer_flops
from .second_order import differentiate_pullback, register_second_order


@custom_op(f"{NAMESPACE}::native_spconv2d", mutates_args=())
def native_spconv2d(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Y [N, M, H_out, W_out] in channels_last and d = S3 - S1 [N, M, 1, 1], float32 or better; on a CPU."""
    geometry = geometry_of(weight_gwc, stride, padding, dilation, groups)
    weights = for_one_call(x, weight_gwc, weight_pwc, weight_redundant, geometry)
    y, d = native_onepass.forward(x, weights, bias, branch_bias)
    assert d is not None  # there are redundant channels
    return y, d


@native_spconv2d.register_fake
def _(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    size = geometry_of(weight_gwc, stride, padding, dilation, groups).output_size(x.shape[2], x.shape[3])
    batch, outputs = x.shape[0], weight_gwc.shape[0]
    y = torch.empty((batch, outputs, *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, x.new_empty((batch, outputs, 1, 1), dtype=torch.promote_types(x.dtype, torch.float32))


@custom_op(f"{NAMESPACE}::native_spconv2d_backward", mutates_args=())
def native_spconv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    d: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six tensors of :func:`native_spconv2d`, laid out as :func:`_layouts` says."""
    geometry = geometry_of(weight_gwc, stride, padding, dilation, groups)
    inputs = [x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias]
    with without_autocast(grad):
        found = gradients(inputs, geometry, d, grad, tuple(needed))
    triples = zip(found, needed, _layouts(x, inputs[1:], needed), strict=True)
    return tuple(
        layout if gradient is None or not need else _laid_out(gradient, layout) for gradient, need, layout in triples
    )  # type: ignore[return-value]


def _laid_out(gradient: Tensor, layout: Tensor) -> Tensor:
    """``gradient`` with the strides of ``layout``; a copy only where they mean another order."""
    pairs = zip(gradient.stride(), layout.stride(), layout.shape, strict=True)
    if all(ours == theirs or size == 1 for ours, theirs, size in pairs):
        return gradient.as_strided(layout.shape, layout.stride())
    return layout.copy_(gradient)


def _layouts(x: Tensor, others: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor]:
    """Uninitialised gradients: of x in channels_last, of the others as they are themselves; [0] where not needed."""
    formats = (torch.channels_last, *(torch.preserve_format,) * len(others))
    return [
        torch.empty_like(tensor, memory_format=layout) if need and tensor is not None else x.new_empty(0)
        for tensor, need, layout in zip((x, *others), needed, formats, strict=True)
    ]


@native_spconv2d_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    d: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    return tuple(_layouts(x, (weight_gwc, weight_pwc, weight_redundant, bias, branch_bias), needed))


TENSORS = 6
"""That the layer takes; its window follows them."""


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:TENSORS], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.window = inputs[TENSORS:]


def _autograd(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    nothing = (None,) * len(ctx.window)
    if grad is None:
        return (*(None,) * TENSORS, *nothing)
    needed = list(ctx.needs_input_grad[:TENSORS])
    found = native_spconv2d_backward(grad, *ctx.saved_tensors, *ctx.window, needed)
    return (*(gradient if need else None for gradient, need in zip(found, needed, strict=True)), *nothing)


native_spconv2d.register_autograd(_autograd, setup_context=_save)


def _second_order(cotangents: tuple[Tensor | None, ...], grad: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    tensors, (_, *window, needed) = arguments[:TENSORS], arguments[TENSORS:]
    geometry = geometry_of(tensors[1], *window)

    def layer(x: Tensor, gwc: Tensor, pwc: Tensor, redundant: Tensor, bias: Any, branch_bias: Any) -> Tensor:
        return native.compose(x, gwc, pwc, redundant, bias, branch_bias, geometry)

    wanted = [cotangent if need else None for cotangent, need in zip(cotangents, needed, strict=True)]
    rest = (None,) * (len(arguments) - TENSORS)
    return *differentiate_pullback(layer, tensors, grad, wanted), *rest


register_second_order(native_spconv2d_backward, _second_order)


flop_formula(getattr(torch.ops, NAMESPACE).native_spconv2d)(forward_flops)


@flop_formula(getattr(torch.ops, NAMESPACE).native_spconv2d_backward)
def _(
    grad_shape: Any,
    x_shape: Any,
    gwc_shape: Any,
    pwc_shape: Any,
    redundant_shape: Any,
    bias: Any,
    branch_bias: Any,
    d: Any,
    *window: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    return 2 * layer_flops(x_shape, gwc_shape, redundant_shape, window[:4])
