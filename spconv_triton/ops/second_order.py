"""Derivatives of the backward operators.

Second derivatives are rare and have no kernels: a backward operator is differentiated as what it computes, the pullback
of the layer, on ATen. What the forward kept for it is a function of the layer's arguments, and counts as recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from ..autocast import without_autocast
from ..optional_arguments import of_present, spread


def register_second_order(backward: CustomOpDef, formula: Callable[..., tuple[Tensor | None, ...]]) -> None:
    """Make ``backward`` differentiable.

    Args:
        formula: called with the gradients by the results of ``backward`` and with its arguments; returns the gradients
            by the arguments.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
        ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]

    def autograd(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.constants, strict=True)
        arguments = [constant if tensor is None else tensor for tensor, constant in pairs]
        with without_autocast(arguments[0]):
            return formula(cotangents, *arguments)

    backward.register_autograd(autograd, setup_context=save)


def differentiate_pullback(
    layer: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    grad: Tensor,
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of sum_i <cotangents_i, dL/dtensors_i> by dL/dY and by each of the tensors; differentiable themselves.

    Args:
        layer: Y as a function of ``tensors``.
        grad: dL/dY.
        cotangents: one for each of the tensors; None is zero.
    """
    present, function = of_present(layer, tensors)

    def pullback(grad: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(function, *values)[1](grad)

    gradients, second = torch.func.vjp(pullback, grad, *(tensors[i] for i in present))[:2]
    directions: list[Tensor] = []
    for i, gradient in zip(present, gradients, strict=True):
        cotangent = cotangents[i]
        directions.append(torch.zeros_like(gradient) if cotangent is None else cotangent.to(gradient.dtype))
    by_grad, *by_present = second(tuple(directions))
    return [by_grad, *spread(by_present, present, len(tensors))]
