"""The averages that the point-wise gradients read at a stride, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from cases import Case

from spconv_triton import reference
from spconv_triton.geometry import Geometry
from spconv_triton.launch import gradients

pytestmark = pytest.mark.usefixtures("poisoned_empty")

CASES = (
    Case("stride-2", 3, 20, 8, (6, 8), stride=(2, 2)),
    Case("odd", 2, 17, 8, (7, 5), stride=(2, 2)),
    Case("one-axis", 2, 8, 8, (5, 9), stride=(1, 3)),
    Case("shifted", 1, 8, 8, (10, 8), stride=(3, 2), padding=(0, 2)),
    Case("wide-padding", 1, 8, 8, (4, 3), stride=(2, 2), padding=(3, 2)),
    Case("dilated", 2, 70, 8, (12, 11), stride=(2, 3), dilation=(2, 1)),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_averages_of_what_lies_inside(case: Case, dtype: torch.dtype, device: str) -> None:
    wide = torch.randn(case.batch, *case.size, case.in_channels + 3, device=device).to(dtype).permute(0, 3, 1, 2)
    geometry = case.geometry._replace(groups=1)
    window = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
    output = case.output_size()
    for x in (wide[:, : case.in_channels].contiguous(), wide[:, 3:]):  # copied, and read where it lies
        pooled = gradients.pooled_windows(x, output, geometry)
        assert pooled is not None
        assert pooled.is_contiguous(memory_format=torch.channels_last)
        exact = reference.pointwise_input(x.double(), case.kernel_size, output, **window)
        rounding = torch.finfo(dtype).eps  # the interpreter truncates to bfloat16
        torch.testing.assert_close(pooled.double(), exact, rtol=rounding, atol=8 * torch.finfo(torch.float32).eps)


def test_at_stride_1_there_is_nothing_to_average(device: str) -> None:
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    assert gradients.pooled_windows(torch.randn(1, 8, 4, 4, device=device), (4, 4), geometry) is None
