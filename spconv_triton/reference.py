"""SPConv in eager PyTorch, to be read beside the paper.

"Split to Be Slim: An Overlooked Redundancy in Vanilla Convolution", Zhang et al., IJCAI 2020, arXiv:2006.12085.

    x3 = x[:, :alpha L],  x1 = x[:, alpha L:]
    U3 = GWC(x3) + PWC(x3)
    U1 = PWC'(x1)
    S3 = GAP(U3),  S1 = GAP(U1)
    beta, gamma = softmax([S3, S1])
    Y  = beta * U3 + gamma * U1

This file depends on nothing but torch, differentiates by autograd, and is clean in float64: it is the judge of every
other path. It checks nothing: what does not fit is refused by PyTorch, in its words. Where the paper is silent
(point-wise convolutions under a stride, odd sizes, biases) it holds the library's semantics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IntPair = int | tuple[int, int]


def representative_branch(
    x3: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 2,
) -> Tensor:
    """U3 = GWC(x3) + PWC(x3): group-wise k x k and point-wise convolution of the same channels, summed.

    Args:
        x3: representative channels, [N, alpha L, H, W], floating point; all arguments have one dtype.
        weight_gwc: [M, alpha L / G, k, k], k odd.
        weight_pwc: [M, alpha L, 1, 1].
        stride, padding, dilation: of the group-wise convolution, in pixels.
        groups: G of the group-wise convolution.

    Returns:
        U3, [N, M, H_out, W_out], in the dtype of ``x3``.
    """
    if x3.dtype == torch.float64:  # with groups PyTorch 2.14.1 gets gradients of a weight in channels_last wrong there
        weight_gwc = weight_gwc.contiguous()
    gwc = F.conv2d(x3, weight_gwc, stride=stride, padding=padding, dilation=dilation, groups=groups)
    centre = pointwise_input(
        x3,
        _pair(weight_gwc.shape[2:]),
        _pair(gwc.shape[2:]),
        stride=stride,
        padding=padding,
        dilation=dilation,
    )
    return gwc + F.conv2d(centre, weight_pwc)


def redundant_branch(
    x1: Tensor,
    weight_redundant: Tensor,
    kernel_size: tuple[int, int],
    output_size: tuple[int, int],
    *,
    stride: IntPair,
    padding: IntPair,
    dilation: IntPair,
) -> Tensor:
    """U1 = PWC'(x1): the 1 x 1 convolution of the redundant channels.

    Args:
        x1: [N, L - alpha L, H, W], floating point.
        weight_redundant: [M, L - alpha L, 1, 1].
        kernel_size, output_size, stride, padding, dilation: of the layer, as of :func:`pointwise_input`.

    Returns:
        U1, [N, M, H_out, W_out], in the dtype of ``x1``.
    """
    window: dict[str, IntPair] = {"stride": stride, "padding": padding, "dilation": dilation}
    return F.conv2d(pointwise_input(x1, kernel_size, output_size, **window), weight_redundant)


def gap_softmax_fusion(u3: Tensor, u1: Tensor) -> Tensor:
    """Y = beta U3 + gamma U1 with beta, gamma = softmax([GAP(U3), GAP(U1)]).

    Args:
        u3, u1: the two branches, [N, M, H, W], floating point.

    Returns:
        Y, [N, M, H, W], in the dtype of ``u3``. Statistics, gate and blend are computed in float32 or better.
    """
    precise = torch.promote_types(u3.dtype, torch.float32)
    s3 = u3.mean((2, 3), keepdim=True, dtype=precise)
    s1 = u1.mean((2, 3), keepdim=True, dtype=precise)
    beta, gamma = torch.softmax(torch.stack([s3, s1]), dim=0)
    return (beta * u3 + gamma * u1).to(u3.dtype)


def spconv2d(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor | None,
    bias: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 2,
    branch_bias: Tensor | None = None,
) -> Tensor:
    """The whole layer: Y = beta U3 + gamma U1 + bias.

    Args:
        x: [N, L, H, W], floating point; all arguments have its dtype, but ``branch_bias``, which may be more precise.
        weight_gwc: [M, alpha L / G, k, k], k odd.
        weight_pwc: [M, alpha L, 1, 1]; its second size says what alpha L is.
        weight_redundant: [M, L - alpha L, 1, 1]; None where alpha = 1, and then Y = U3.
        bias: [M], added after the gate.
        stride, padding, dilation: in pixels, as of ``torch.nn.functional.conv2d``.
        groups: G.
        branch_bias: [2, M], added to U3 and to U1 before the gate (a folded branch norm).

    Returns:
        Y, [N, M, H_out, W_out], in the dtype of ``x``.
    """
    representative = weight_pwc.shape[1]
    x3, x1 = x[:, :representative], x[:, representative:]
    u3 = representative_branch(
        x3, weight_gwc, weight_pwc, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    if branch_bias is not None:
        u3 = (u3 + branch_bias[0, :, None, None]).to(x.dtype)
    if x1.shape[1] == 0 or weight_redundant is None:
        y = u3
    else:
        window: dict[str, IntPair] = {"stride": stride, "padding": padding, "dilation": dilation}
        u1 = redundant_branch(x1, weight_redundant, _pair(weight_gwc.shape[2:]), _pair(u3.shape[2:]), **window)
        if branch_bias is not None:
            u1 = (u1 + branch_bias[1, :, None, None]).to(x.dtype)
        y = gap_softmax_fusion(u3, u1)
    return y if bias is None else y + bias[:, None, None]


def spconv2d_batch_norm(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor,
    bias: Tensor | None = None,
    *,
    norm_representative: tuple[Tensor | None, Tensor | None] = (None, None),
    norm_redundant: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: tuple[float, float] = (1e-5, 1e-5),
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer with a batch norm on U3 and on U1 before the gate, as the published implementation has it:
    w (U - mean) / sqrt(variance + eps) + b over the samples and pixels of a channel.

    Args:
        x, weight_gwc, weight_pwc, weight_redundant, bias, stride, padding, dilation, groups: as of :func:`spconv2d`.
        norm_representative, norm_redundant: w and b of either norm, [M]; None for 1 and 0.
        eps: of either norm.

    Returns:
        Y, [N, M, H_out, W_out], in the dtype of ``x``; and mean and variance (by N H_out W_out) of U3 and U1, [2, M]
        each, in float32 or better and without gradients.
    """
    representative = weight_pwc.shape[1]
    window: dict[str, IntPair] = {"stride": stride, "padding": padding, "dilation": dilation}
    u3 = representative_branch(x[:, :representative], weight_gwc, weight_pwc, groups=groups, **window)
    kernel_size, output_size = _pair(weight_gwc.shape[2:]), _pair(u3.shape[2:])
    u1 = redundant_branch(x[:, representative:], weight_redundant, kernel_size, output_size, **window)
    precise = torch.promote_types(x.dtype, torch.float32)
    normed, moments = [], []
    for u, norm, least in zip((u3, u1), (norm_representative, norm_redundant), eps, strict=True):
        weight, shift = (None if t is None else t.to(precise) for t in norm)
        if weight is None and shift is not None:  # which PyTorch fails to differentiate on a GPU
            weight = torch.ones_like(shift)
        normed.append(F.batch_norm(u, None, None, weight, shift, training=True, eps=least))
        moments.append(torch.var_mean(u.detach().to(precise), (0, 2, 3), correction=0))
    variance, mean = (torch.stack(of_both) for of_both in zip(*moments, strict=True))
    y = gap_softmax_fusion(*normed)
    return y if bias is None else y + bias[:, None, None], mean, variance


def pointwise_input(
    x: Tensor,
    kernel_size: tuple[int, int],
    output_size: tuple[int, int],
    *,
    stride: IntPair,
    padding: IntPair,
    dilation: IntPair,
) -> Tensor:
    """What a 1 x 1 convolution of the layer reads: the centre tap, averaged over a stride-sized window.

    Output row i reads the rows from ``i * stride + dilation * (k - 1) / 2 - padding`` on, ``stride`` of them,
    averaged over those inside ``x``; a window wholly outside counts as zero. Columns likewise.

    Args:
        x: [N, C, H, W], floating point.
        kernel_size, output_size: k and (H_out, W_out), (vertical, horizontal) each.
        stride, padding, dilation: in pixels, of the layer.

    Returns:
        [N, C, H_out, W_out], in the dtype of ``x``.
    """
    pads: list[int] = []
    valid: list[Tensor] = []
    for size, k, out, s, p, d in zip(
        x.shape[2:], kernel_size, output_size, _pair(stride), _pair(padding), _pair(dilation), strict=True
    ):
        first = d * (k - 1) // 2 - p
        pads = [
            -first,
            first + s * out - size,
            *pads,
        ]  # F.pad counts from the last axis; negative values crop
        start = torch.arange(out, device=x.device) * s + first
        valid.append((start + s).clamp(max=size) - start.clamp(min=0))
    windows = F.pad(x, pads)
    if _pair(stride) == (1, 1):
        return windows
    averages = F.avg_pool2d(windows, _pair(stride))  # over all pixels of a window, those outside x as zeros
    precise = torch.promote_types(x.dtype, torch.float32)
    rows, columns = (s / v.clamp(min=1).to(precise) for s, v in zip(_pair(stride), valid, strict=True))
    return (averages * (rows[:, None] * columns)).to(x.dtype)


def _pair(value: IntPair | torch.Size) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return first, second
