"""What holds for every layer, on the kernels: they agree with the reference, and NaN and infinities show."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis", reason="draws layers at random")

from cases import Inputs, assert_agrees
from hypothesis import Phase, given, settings
from nonfinite import assert_spreads_as_in_the_reference
from strategies import calls, calls_with_what_is_not_finite, layers
from torch import Tensor

from spconv_triton import functional
from spconv_triton.dispatch import INTERPRETED, TRITON_DTYPES

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="a GPU would compile kernels for each of the layers that are drawn"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of infinities
]

SMALL = layers(largest=2, extra_pixels=2)

# A layer takes the interpreter about a second, and shrinking one takes hundreds of layers.
few = settings(max_examples=max(1, settings().max_examples // 8), phases=[Phase.explicit, Phase.generate])


def triton(*arguments: Tensor | None, **options: object) -> Tensor:
    return functional.spconv2d(*arguments, backend="triton", **options)


@few
@given(inputs=calls(cases=SMALL, dtypes=TRITON_DTYPES))
def test_any_layer_agrees_with_the_reference(inputs: Inputs) -> None:
    assert_agrees(triton, inputs, perturbations=4)


@few
@given(inputs=calls_with_what_is_not_finite(cases=SMALL, dtypes=TRITON_DTYPES))
def test_any_layer_is_nan_where_the_reference_is(inputs: Inputs) -> None:
    """And maybe elsewhere in a plane of the output: a mean that is not finite makes all of it NaN."""
    assert_spreads_as_in_the_reference(triton, inputs, extent="more")
