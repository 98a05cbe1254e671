"""SPConv weights that start from those of a dense convolution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from .geometry import Geometry

CORRELATION = 0.5
"""Of neighbouring pixels in a feature map, as assumed. At 0 (white noise) a 1 x 1 kernel is the centre tap, at 1 the
sum of the taps.

On ResNet-20 trained on the digits, where neighbours correlate by 0.25 to 0.82, the layers at alpha 1/2 are off by 0.66
of the convolution's output at 0.5, against 0.78 at 0, 0.85 at 1 and 1.05 with weights drawn afresh; one epoch of
fine-tuning (22 steps) takes it to 59 % test accuracy, against 29, 26 and 11 %. After 2 and 3 epochs the centre tap is
as good. ``python -m benchmarks.dense_init`` prints these. What remains is what 1 x 1 kernels cannot do, and the gate's:
it is not 1/2 where the branches' means differ, which weights alone do not tell.
"""


class SplitWeights(NamedTuple):
    """The weights of an SPConv layer.

    Attributes:
        gwc: [M, alpha L / G, k, k].
        pwc: [M, alpha L, 1, 1].
        redundant: [M, L - alpha L, 1, 1].
    """

    gwc: Tensor
    pwc: Tensor
    redundant: Tensor


def split_weights(
    weight: Tensor, representative: int, geometry: Geometry, correlation: float = CORRELATION
) -> SplitWeights:
    """The SPConv weights whose layer comes closest to a dense convolution, in the mean square and without any data.

    Assumed of x: channels independent of each other, all pixels alike, and ``correlation ** distance`` between two
    pixels of a channel, rows and columns apart. Then every pair of output and input channel is a problem of its own. A
    representative channel of the output's own group keeps its k x k kernel W in the group-wise convolution, exactly.
    Any other has a 1 x 1 kernel on z (the centre tap; at a stride, the mean over the window), whose best weight is

        sum_t W[t] c[t],   c[t] = E[x[t] z] / E[z^2]

    The gate starts near beta = gamma = 1/2, so the branches get twice the weights; at alpha = 1 there is no gate.

    Args:
        weight: [M, L, k, k] of the dense convolution.
        representative: alpha L.
        geometry: of the SPConv layer, with its G.
        correlation: of neighbouring pixels, in [0, 1].

    Returns:
        Weights in the dtype of ``weight``, computed in float32 or better.
    """
    groups = geometry.groups
    precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if representative < weight.shape[1]:
        precise = 2 * precise
    rows, columns = (_regression(geometry, axis, correlation).to(precise) for axis in (0, 1))
    pointwise = torch.einsum("m l r c, r, c -> m l", precise, rows, columns)
    pairs = rearrange(precise[:, :representative], "(g m) (h l) r c -> m l r c g h", g=groups, h=groups)
    gwc = rearrange(pairs.diagonal(dim1=4, dim2=5), "m l r c g -> (g m) l r c")
    other = 1 - torch.eye(groups, device=weight.device, dtype=precise.dtype)
    pairs = rearrange(pointwise[:, :representative], "(g m) (h l) -> m l g h", g=groups, h=groups) * other
    pwc = rearrange(pairs, "m l g h -> (g m) (h l) 1 1")
    redundant = rearrange(pointwise[:, representative:], "m l -> m l 1 1")
    return SplitWeights(*(w.to(weight.dtype) for w in (gwc, pwc, redundant)))


def _regression(geometry: Geometry, axis: int, correlation: float) -> Tensor:
    """c along one axis, [k] in float64: the model's correlation is a product over the axes, and so is c."""
    size, stride, dilation = geometry.kernel_size[axis], geometry.stride[axis], geometry.dilation[axis]
    taps = dilation * (torch.arange(size, dtype=torch.float64) - size // 2)  # from the centre
    window = torch.arange(stride, dtype=torch.float64)
    with_taps = correlation ** (taps[:, None] - window).abs()
    with_itself = correlation ** (window[:, None] - window).abs()
    return with_taps.mean(1) / with_itself.mean()
