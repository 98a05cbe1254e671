"""A layer with batch norms in its branches: fresh inputs, and every result of it by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, Results, assert_within_budget_over_draws, make_inputs
from torch import Tensor

from spconv_triton import functional
from spconv_triton.dispatch import INTERPRETED

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


def judged(leaves: Leaves, case: Case, backend: str) -> tuple[Results, Results, Results]:
    """By ``backend`` in one pass, part by part in the same dtype, and part by part in float64."""
    x = leaves["x"]
    assert x is not None
    grad = torch.randn((case.batch, case.out_channels, *case.output_size()), device=x.device).to(x.dtype)
    one, parts = (run(leaves, case, which, grad) for which in (backend, "reference"))
    exact = run(cast(leaves, torch.float64), case, "reference", grad)
    if backend == "triton" and INTERPRETED and x.dtype == torch.bfloat16:
        # The interpreter truncates to bfloat16 where a GPU rounds, which shows in the mean of many values.
        del exact["mean"], exact["variance"]
    return one, parts, exact


def check_over_draws(
    draw: Callable[[], Leaves], case: Case, draws: int, backend: str, *, condition: float = 1.0
) -> None:
    """Within the budget in the geometric mean over the draws: the yardstick is lucky in some.

    Ratios of single draws spread by factors of 1.5 to 3 around means of 0.1 to 0.6: one in some hundred is above 1.
    """
    assert_within_budget_over_draws((judged(draw(), case, backend) for _ in range(draws)), condition=condition)


def batch_normed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends of the calls, from now on, that normalise by the batch in one function."""
    calls: list[str] = []
    original = functional.spconv2d_batch_norm

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["backend"])
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "spconv2d_batch_norm", counted)
    return calls
