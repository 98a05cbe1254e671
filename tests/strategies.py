"""Hypothesis strategies: any legal layer, on tensors of any strides, and values that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import Case, Inputs, make_inputs
from hypothesis import strategies as st
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


def _contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _transposed(t: Tensor) -> Tensor:
    """Columns before rows in memory."""
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def _batch_last(t: Tensor) -> Tensor:
    return t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def _channel_slice(t: Tensor) -> Tensor:
    """The middle channels of a wider channels_last tensor: pixels with gaps, and a storage offset."""
    return _channels_last(torch.cat((t, t, t), 1))[:, t.shape[1] : 2 * t.shape[1]]


def _every_other_column(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, 3)[..., 1::2]


def _crop(t: Tensor) -> Tensor:
    return torch.nn.functional.pad(t, (1, 2, 2, 1), value=7.0)[:, :, 2:-1, 1:-2]


def _one_sample_expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def _one_channel_expanded(t: Tensor) -> Tensor:
    return t[:, :1].expand(t.shape)


def _one_pixel_expanded(t: Tensor) -> Tensor:
    return t[:, :, :1, :1].expand(t.shape)


VIEWS: tuple[Callable[[Tensor], Tensor], ...] = (
    _channels_last,
    _contiguous,
    _transposed,
    _batch_last,
    _channel_slice,
    _every_other_column,
    _crop,
    _one_sample_expanded,
    _one_channel_expanded,
    _one_pixel_expanded,
)
"""What [N, C, H, W] may look like in memory. The expanded ones repeat values as well."""


def pairs(minimum: int, maximum: int) -> st.SearchStrategy[tuple[int, int]]:
    """(vertical, horizontal)."""
    value = st.integers(minimum, maximum)
    return st.tuples(value, value)


@st.composite
def layers(draw: st.DrawFn, *, largest: int = 4, extra_pixels: int = 7) -> Case:
    """Any legal layer and input size.

    Args:
        largest: of the batch, the group count, and a group's input and output channels; redundant channels go up to
            twice as many.
        extra_pixels: how many rows and columns the input may have beyond what one output pixel needs.
    """
    kernel_size = draw(st.tuples(*[st.sampled_from((3, 1, 5))] * 2))
    padding, dilation = draw(pairs(0, 3)), draw(pairs(1, 2))
    height, width = (
        max(1, d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, extra_pixels))
        for k, p, d in zip(kernel_size, padding, dilation, strict=True)
    )
    groups = draw(st.integers(1, largest))
    representative = groups * draw(st.integers(1, largest))
    channels = representative + draw(st.integers(0, 2 * largest))
    return Case(
        "drawn",
        batch=draw(st.integers(0, largest)),
        in_channels=channels,
        out_channels=groups * draw(st.integers(1, largest)),
        size=(height, width),
        kernel_size=kernel_size,
        stride=draw(pairs(1, 3)),
        padding=padding,
        dilation=dilation,
        groups=groups,
        # alpha L is rounded down, so half a channel more keeps it off the edge.
        alpha=1.0 if representative == channels else (representative + 0.5) / channels,
    )


@st.composite
def calls(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype] = FLOATING,
    cases: st.SearchStrategy[Case] | None = None,
    device: str = "cpu",
) -> Inputs:
    """Any legal call of ``spconv2d``: a layer, its dtype, and the strides and storage offsets of its tensors."""
    case, dtype = draw(layers() if cases is None else cases), draw(st.sampled_from(dtypes))
    torch.manual_seed(draw(st.integers(0, 2**31 - 1)))
    inputs = make_inputs(case, dtype, device=device, bias=draw(st.booleans()), branch_bias=draw(st.booleans()))
    for name, tensor in inputs.tensors().items():
        if tensor.dim() == 4 and tensor.numel():
            viewed = draw(st.sampled_from(VIEWS))(tensor.detach())
        elif draw(st.booleans()):
            viewed = tensor.detach().repeat_interleave(2, -1)[..., 1::2]
        else:
            continue
        setattr(inputs, name, viewed.requires_grad_())
    if inputs.branch_bias is not None and draw(st.booleans()) and dtype != torch.float64:
        inputs.branch_bias = inputs.branch_bias.detach().float().requires_grad_()
    return inputs


@st.composite
def calls_with_what_is_not_finite(draw: st.DrawFn, **options: Any) -> Inputs:
    """As :func:`calls`, with NaN or infinities in one to three elements of any of the tensors.

    But not of a k x k weight where there is padding: some of ATen's convolutions multiply it by the zeros there, which
    is NaN, and others skip them.
    """
    inputs = draw(calls(**options))
    names = [name for name in inputs.tensors() if name != "weight_gwc" or inputs.window["padding"] == (0, 0)]
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(("x", *names)))
        tensor = inputs.tensors()[name].detach().clone()
        if tensor.numel():
            where = tuple(draw(st.integers(0, size - 1)) for size in tensor.shape)
            tensor[where] = draw(st.sampled_from(NOT_FINITE))
            setattr(inputs, name, tensor.requires_grad_())
    return inputs
