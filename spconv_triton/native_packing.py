"""The group-wise weight in the order in which oneDNN computes, kept by a layer from one inference to the next.

A convolution reorders its weight in every call, which for the deep layers of a network, whose weights are many and maps
small, takes as long as the products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .native_convolution import are_readable

SAMPLE = 16384
"""Elements of a weight that are compared in every call."""

AVAILABLE = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_convolution_pointwise", "_reorder_convolution_weight")
)


class _Kept(NamedTuple):
    """What is known of a weight.

    Attributes:
        state: where it lies, its version, and the window it is packed for.
        values: the weight, which keeps its memory from being given to another.
        some, sample: some of its values, as they are and as they were.
        packed: oneDNN's tensor; None when the weight has been seen but once, for many are never seen again.
    """

    state: tuple[Any, ...]
    values: Tensor
    some: Tensor
    sample: Tensor
    packed: Tensor | None


class Packing:
    """What a layer keeps of its weight.

    It holds for as long as the weight is what it was: at the same place and in the same version, which in-place
    operations, optimizers and ``load_state_dict`` move. What is written past the version, through ``weight.data`` or by
    another process, is seen by a sample of the values: all of a weight of up to SAMPLE elements, else one of every few,
    spread over all of it. Copies and pickles of a layer keep nothing.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def __reduce__(self) -> tuple[type[Packing], tuple[()]]:
        return Packing, ()

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, *window: Any) -> Tensor | None:
        """``F.conv2d`` as a new tensor in channels_last; None where there is nothing to gain, or nothing to go by.

        Args:
            x: [N, C, H, W] in channels_last, or a slice of its channels.
            weight: [M, C / G, k, k].
            window: stride, padding, dilation and groups.
        """
        if not (AVAILABLE and x.is_cpu and x.dtype == torch.float32 and x.numel() > 0 and not weight.is_inference()):
            return None
        if torch._C._len_torch_dispatch_stack() > 0 or not torch._C._get_mkldnn_enabled():
            return None
        stride, padding, dilation, groups = window
        if not are_readable(x, weight, stride, padding, dilation):
            return None
        packed = self._find(weight, window)
        if packed is None:
            return None
        return torch.ops.mkldnn._convolution_pointwise.default(
            x, packed, bias, padding, stride, dilation, groups, "none", [], ""
        )

    def forget(self) -> None:
        self._kept = None

    def _find(self, weight: Tensor, window: tuple[Any, ...]) -> Tensor | None:
        state = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), window)
        kept = self._kept
        if kept is None or kept.state != state or not torch.equal(kept.some, kept.sample):
            values = weight.detach()
            # A sample is taken from memory without gaps.
            if values.is_contiguous() or values.is_contiguous(memory_format=torch.channels_last):
                some = _sample(values)
                self._kept = _Kept(state, values, some, some.clone(), None)
            return None
        if kept.packed is None:
            kept = kept._replace(packed=_pack(kept.values, *window))
            self._kept = kept
        return kept.packed


def _sample(values: Tensor) -> Tensor:
    """At most SAMPLE of them, evenly spread over their memory, a view."""
    step = -(-values.numel() // SAMPLE)
    return values.as_strided((-(-values.numel() // step),), (step,))


def _pack(
    weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int
) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, None)
