"""Elements past 2^31 are reached: offsets are 64 bits wide, and nothing narrower overflows on the way."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from cases import Case, Inputs, assert_agrees, make_inputs

from spconv_triton import functional
from spconv_triton.dispatch import INTERPRETED
from spconv_triton.launch.common import pixel_arguments

pytestmark = pytest.mark.usefixtures("overflow_checked")


def far_apart(inputs: Inputs) -> Inputs:
    """The same values, the pixels of ``x`` so far apart that the last lies past element 2^31 of its storage.

    The gaps are never touched, so the system does not back them with memory.
    """
    batch, channels, height, width = inputs.x.shape
    pixels = batch * height * width
    spacing = 2**31 // (pixels - 2)
    storage = torch.empty(spacing * (pixels - 1) + channels, dtype=inputs.x.dtype, device=inputs.x.device)
    assert spacing * (pixels - 1) > 2**31
    x = storage.as_strided(inputs.x.shape, (height * width * spacing, 1, width * spacing, spacing))
    x.copy_(inputs.x.detach())
    inputs.x = x.requires_grad_()
    return inputs


def test_layer_and_its_gradients(device: str) -> None:
    inputs = far_apart(make_inputs(Case("far", 2, 8, 8, (3, 4)), torch.float16, device=device))
    assert_agrees(functional.spconv2d, inputs, backend="triton")


def test_branch(device: str) -> None:
    case = Case("far-branch", 2, 8, 8, (3, 4), alpha=1.0)
    inputs = far_apart(make_inputs(case, torch.float16, device=device))
    assert_agrees(functional.spconv2d, inputs, backend="triton")


def test_input_pixels_count_too() -> None:
    with pytest.raises(ValueError, match=r"x3 must have at most \d+ pixels in a batch"):
        pixel_arguments(torch.empty(70_000, 8, 181, 181, device="meta"), (91, 91), "x3")


@triton.jit
def store_sum(out_ptr, first, second):
    tl.store(out_ptr, (first + second).to(tl.int64))


@pytest.mark.skipif(not INTERPRETED, reason="GPUs wrap round without a word")
def test_a_sum_that_overflows_would_be_found() -> None:
    out = torch.empty(1, dtype=torch.int64)
    with pytest.raises(Exception, match="int32 overflow detected for operation add"):
        store_sum[(1,)](out, 2**31 - 1, 1)
    store_sum[(1,)](out, 2**31 - 2, 1)
    assert out.item() == 2**31 - 1
