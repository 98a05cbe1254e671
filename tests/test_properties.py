"""What holds for every layer, on ATen: it agrees with the reference, whatever its sizes, dtype and strides."""

from __future__ import annotations

from cases import Inputs, assert_agrees
from hypothesis import given
from strategies import calls
from torch import Tensor

from spconv_triton.functional import spconv2d


def native(*arguments: Tensor | None, **options: object) -> Tensor:
    return spconv2d(*arguments, backend="native", **options)


@given(inputs=calls())
def test_any_layer_agrees_with_the_reference(inputs: Inputs) -> None:
    assert_agrees(native, inputs, perturbations=4)
