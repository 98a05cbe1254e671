"""A layer with batch norms in its branches: fresh inputs, and every result of it by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, make_inputs
from torch import Tensor

from spconv_triton import functional

NORMS = ("weight3", "bias3", "weight1", "bias1")

Leaves = dict[str, Tensor | None]


def make_leaves(
    case: Case,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    mean: float = 0.0,
    gate: float = 0.0,
    memory_format: torch.memory_format = torch.channels_last,
) -> Leaves:
    """Inputs of the layer and parameters of its norms, which shift S3 - S1 by ``gate``."""
    inputs = make_inputs(case, dtype, device=device, mean=mean, memory_format=memory_format)
    norms = {name: torch.randn(case.out_channels, device=device).requires_grad_() for name in NORMS}
    with torch.no_grad():
        norms["bias3"] += gate
    return {**inputs.tensors(), **norms}


def cast(leaves: Leaves, dtype: torch.dtype) -> Leaves:
    return {name: None if leaf is None else leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}


def layer(leaves: Leaves, case: Case, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return functional.spconv2d_batch_norm(
        *(leaves[name] for name in ("x", "weight_gwc", "weight_pwc", "weight_redundant", "bias")),
        norm_representative=(leaves["weight3"], leaves["bias3"]),
        norm_redundant=(leaves["weight1"], leaves["bias1"]),
        eps=(1e-5, 1e-3),
        backend=backend,
        **case.window,
    )


def run(leaves: Leaves, case: Case, backend: str, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Output, statistics and gradients by name."""
    y, mean, variance = layer(leaves, case, backend)
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    found = {"y": y.detach(), "mean": mean, "variance": variance}
    if grad is not None:
        found |= dict(zip(present, torch.autograd.grad(y, list(present.values()), grad.to(y.dtype)), strict=True))
    return found


def batch_normed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends of the calls, from now on, that normalise by the batch in one function."""
    calls: list[str] = []
    original = functional.spconv2d_batch_norm

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["backend"])
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "spconv2d_batch_norm", counted)
    return calls
