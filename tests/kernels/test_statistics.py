"""The sums that the gate is made of, against unfolded windows in float64."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from torch.nn.functional import avg_pool2d, unfold

from spconv_triton.launch import layer

# At stride 1 large maps are summed whole, less what some tap does not read of the edges; small ones tap by tap.
CASES = (
    Case("small", 2, 20, 8, (7, 7)),
    Case("large", 2, 20, 8, (13, 12)),
    Case("splits", 1, 8, 8, (33, 35)),
    Case("one-row", 2, 8, 8, (1, 300)),
    Case("one-column", 2, 8, 8, (300, 1)),
    Case("two-columns", 2, 8, 8, (150, 2)),
    Case("no-padding", 2, 8, 8, (14, 15), padding=(0, 0)),
    Case("wide-padding", 1, 8, 8, (14, 15), padding=(3, 2)),
    Case("dilated", 2, 8, 8, (21, 16), dilation=(3, 2), padding=(3, 1)),
    Case("k5", 1, 8, 8, (18, 17), kernel_size=(5, 5), padding=(2, 2)),
    Case("k1", 1, 8, 8, (18, 17), kernel_size=(1, 1), padding=(0, 0)),
    Case("k9", 1, 8, 8, (16, 15), kernel_size=(9, 9), padding=(4, 4)),
    Case("k11-stride-2", 1, 8, 8, (16, 15), kernel_size=(11, 11), padding=(5, 5), stride=(2, 2)),
    Case("stride-2", 2, 8, 8, (18, 14), stride=(2, 2)),
    Case("stride-3-odd", 1, 8, 8, (19, 16), stride=(3, 2)),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_of_what_each_tap_reads(case: Case, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(case.batch, *case.size, case.in_channels, device=device).to(dtype).permute(0, 3, 1, 2)
    geometry = case.geometry._replace(groups=1)
    weights = tuple(torch.empty(1, 1, device=device) for _ in range(3))  # which are packed elsewhere
    partial, pool_row = layer._window_statistics(x, case.in_channels, weights, None, case.output_size(), geometry)
    got = partial.double().sum(0)

    window = {"dilation": case.dilation, "padding": case.padding, "stride": case.stride}
    exact = x.double()
    read = unfold(exact, case.kernel_size, **window).unflatten(1, (case.in_channels, -1))
    taps = geometry.taps
    # A sum of n numbers near 1 in float32.
    tolerance = 2**-22 * x[0, 0].numel()
    torch.testing.assert_close(got[:, :taps], read.sum(3).transpose(1, 2), rtol=0, atol=tolerance)
    if case.name == "stride-2":  # whose windows lie wholly inside
        pooled = got[:, pool_row : pool_row + 2].sum(1)
        torch.testing.assert_close(pooled, avg_pool2d(exact, 2).sum((2, 3)), rtol=0, atol=4 * tolerance)
