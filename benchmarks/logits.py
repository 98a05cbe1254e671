"""Networks that are fit to be timed: their norms have the images' statistics, and their logits are right."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from cases import assert_within_budget
from torch import Tensor, nn

from spconv_triton import SPConv2d

CHECKED = 2
"""Images whose logits are compared with float64."""

CONDITION = 64.0
"""Roundings that a deep network may add to twice what its eager reference is wrong by."""


def calibrated(model: nn.Module, images: Tensor) -> nn.Module:
    """``model`` in eval mode, its norms' statistics those of ``images``: as in a trained network, no map explodes."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


class Right(NamedTuple):
    """Logits of the first images, in the dtype of the images and in float64."""

    same_dtype: Tensor
    exact: Tensor


def right(eager: nn.Module, images: Tensor) -> Right:
    """What ``eager`` should give of ``images``, SPConv by its reference: what is timed is no judge of itself."""
    judge = copy.deepcopy(eager)
    for module in judge.modules():
        if isinstance(module, SPConv2d):
            module.backend = "reference"
    few = images[:CHECKED]
    with torch.inference_mode():
        return Right(judge(few), judge.double()(few.double()))


def check(name: str, model: nn.Module, images: Tensor, expected: Right) -> None:
    """The logits of the first images are right, all of them given at once as they are when it is timed.

    Raises:
        AssertionError: they are outside the error budget.
    """
    with torch.inference_mode():
        assert_within_budget(name, model(images)[:CHECKED], *expected, condition=CONDITION)
