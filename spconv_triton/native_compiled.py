"""The layer as ATen operations for Inductor, on a CPU.

Inductor fuses all that is done element by element, the sums and the gate among it, so nothing is written in place here.
What it calls are libraries, and 1 x 1 convolutions as matrix products over pixels are the ones that take less time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native, reference
from .dispatch import is_exporting
from .geometry import Geometry
from .native import Epilogue
from .native_convolution import are_products_precise, pixels
from .native_gate import exponent, gate_dtype


def compose(
    x: Tensor,
    weight_gwc: Tensor,
    weight_pwc: Tensor,
    weight_redundant: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    geometry: Geometry,
    after: Epilogue | None = None,
) -> Tensor:
    """As :func:`spconv_triton.native.compose`, which it is wherever a convolution is no matrix product."""
    if weight_redundant is None or not _is_matrix_product(x):
        return native.compose(x, weight_gwc, weight_pwc, weight_redundant, bias, branch_bias, geometry, after)
    x = x.contiguous(memory_format=torch.channels_last)
    z = native.pointwise_input(x, geometry)
    gwc = F.conv2d(x[:, : weight_pwc.shape[1]], weight_gwc, None, *geometry[1:])
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # half a second, and loaded by the compiler

    # False of sizes that may vary, so that no size is compiled for.
    gate_first = statically_known_true(gwc.shape[2] * gwc.shape[3] > x.shape[1])
    fused = _gate_first if gate_first else _both_branches
    y = fused(gwc, z, weight_pwc, weight_redundant, branch_bias)
    if after is not None:
        return after(y, bias)
    return y if bias is None else y + bias[:, None, None]


def _gate_first(
    gwc: Tensor, z: Tensor, weight_pwc: Tensor, weight_redundant: Tensor, branch_bias: Tensor | None
) -> Tensor:
    """beta U3 + gamma U1 by point-wise weights of each sample, scaled by its gate, which is there before any branch."""
    d = _difference_of_means(gwc, z, weight_pwc, weight_redundant, branch_bias)
    beta, gamma = torch.sigmoid(d), torch.sigmoid(-d)
    weights = torch.cat((weight_pwc.flatten(1) * beta[:, :, 0], weight_redundant.flatten(1) * gamma[:, :, 0]), 2)
    y = gwc * beta
    if branch_bias is not None:
        b3, b1 = branch_bias.to(y.dtype)[:, :, None, None].unbind()
        y = y + (beta * b3 + gamma * b1)
    return torch.baddbmm(pixels(y), pixels(z), weights.mT).unflatten(1, y.shape[2:]).permute(0, 3, 1, 2)


def _difference_of_means(
    gwc: Tensor, z: Tensor, weight_pwc: Tensor, weight_redundant: Tensor, branch_bias: Tensor | None
) -> Tensor:
    """S3 - S1, [N, M, 1, 1]: GAP and convolution are both linear, so that sums of z stand for point-wise maps."""
    z3, z1 = _pixel_sums(z).split((weight_pwc.shape[1], weight_redundant.shape[1]), 1)
    pixels = gwc.shape[2] * gwc.shape[3]
    s3 = torch.addmm(_pixel_sums(gwc), z3, weight_pwc.to(z3.dtype).flatten(1).T) / pixels
    s1 = torch.mm(z1, weight_redundant.to(z1.dtype).flatten(1).T) / pixels
    if branch_bias is not None:
        s3 += branch_bias[0]
        s1 += branch_bias[1]
    return exponent(s3, s1)[:, :, None, None].to(gate_dtype(gwc))


def _pixel_sums(x: Tensor) -> Tensor:
    """Sums over the pixels of [N, C, H, W]: [N, C] in float64.

    Where x has a mean, S3 and S1 are large and their difference is not. Inductor adds one term after the other, so
    float64 begins with the rows.
    """
    return x.sum(3).sum(2, dtype=torch.float64)


def _both_branches(
    gwc: Tensor, z: Tensor, weight_pwc: Tensor, weight_redundant: Tensor, branch_bias: Tensor | None
) -> Tensor:
    """beta U3 + gamma U1 from the branches."""
    columns, representative = _rows(z), weight_pwc.shape[1]
    u3 = torch.addmm(_rows(gwc), columns[:, :representative], weight_pwc.flatten(1).t())
    u1 = torch.mm(columns[:, representative:], weight_redundant.flatten(1).t())
    if branch_bias is not None:
        u3, u1 = ((u + b).to(z.dtype) for u, b in zip((u3, u1), branch_bias.unbind(), strict=True))
    batch, outputs, height, width = gwc.shape
    u3, u1 = (u.view(batch, height, width, outputs).permute(0, 3, 1, 2) for u in (u3, u1))
    return reference.gap_softmax_fusion(u3, u1)


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] in channels_last as [N H W, C], a view."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _is_matrix_product(x: Tensor) -> bool:
    """Whether 1 x 1 convolutions of ``x`` may be and gain by it: as precise, and no model to be exported."""
    return x.is_cpu and not is_exporting() and x.dtype != torch.bfloat16 and are_products_precise(x.dtype)
