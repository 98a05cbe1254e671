"""What NaN and infinities must come out as: as in the reference, whose softmax over an infinite mean is NaN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Inputs, assert_within_budget, output_grad, references, run
from torch import Tensor
from torch.nn import functional as F

from spconv_triton import reference


def assert_spreads_as_in_the_reference(
    function: Callable[..., Tensor], inputs: Inputs, *, extent: str = "exact", **options: object
) -> None:
    """Output and gradients are NaN and infinite where the reference's are, and within budget elsewhere.

    Args:
        extent: ``"exact"``: NaN is there and nowhere else. ``"planes"``: it may also fill the rest of a plane of the
            output that has one, and any gradient that has one. ``"more"``: it may be elsewhere too.
    """
    grad = output_grad(inputs)
    got = run(function, inputs, grad, **options)
    exact = run(reference.spconv2d, inputs.to(torch.float64), grad)
    same_dtype = references(inputs, grad)
    for name, value in got.items():
        # An infinite weight over a zero of the padding is NaN to some of ATen's convolutions, and nothing to others.
        nan = torch.stack([r[name].isnan() for r in (*same_dtype, exact)])
        must, may = nan.all(0), nan.any(0)
        if extent == "planes":
            may = may.flatten(2).any(2)[:, :, None, None] if name == "y" else may.any()
        elif extent == "more":
            may = torch.ones_like(may)
        if name == "weight_gwc":  # nor is a NaN over a tap that reads nothing but padding
            must &= _reads_pixels(inputs)
        missing, more = must & ~value.isnan(), value.isnan() & ~may
        assert not missing.any(), f"{name}: {int(missing.sum())} elements are not NaN, and in the reference they are"
        assert not more.any(), f"{name}: {int(more.sum())} elements are NaN, and in the reference they are not"
        expected = same_dtype[0][name]
        infinite = expected.isinf() & ~value.isnan()
        assert torch.equal(value[infinite], expected[infinite]), f"{name}: infinities differ"
        compared = expected.isfinite() & exact[name].isfinite() & ~value.isnan()
        assert_within_budget(name, *(torch.where(compared, t, 0) for t in (value, expected, exact[name])), factor=8)


def _reads_pixels(inputs: Inputs) -> Tensor:
    """[k, k]: whether a tap reads any pixel at all."""
    kernel = inputs.weight_gwc.shape[2:]
    window = {name: inputs.window[name] for name in ("stride", "padding", "dilation")}
    return F.unfold(torch.ones(1, 1, *inputs.x.shape[2:]), kernel, **window).sum((0, 2)).view(kernel) > 0
