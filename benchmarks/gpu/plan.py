"""Which layers the kit checks and times, and against whom; in a rehearsal the same lists, short and tiny."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from cases import RESNET50, SMALL, Case

FEW = ("conv2d", "reference", "triton")
COMPILED = ("reference compiled", "triton compiled")

LARGE, MIDDLE = 128, 32
"""Images in a batch."""

NETWORK = 64
"""Likewise, of the whole network."""

TINY = Case("tiny", 1, 4, 4, (2, 3), kernel_size=(1, 3), padding=(0, 1))
"""Rehearses for all that is timed."""

TRANSITIONS = tuple(
    Case(f"resnet50-{c}@{s}/2", 1, c, c, (s, s), stride=(2, 2)) for c, s in ((128, 56), (256, 28), (512, 14))
)
"""ResNet-50's 3 x 3 convolutions at a stride."""

OTHERS = (
    Case("resnet20-16@32", 1, 16, 16, (32, 32)),
    Case("resnet20-64@8", 1, 64, 64, (8, 8)),
    Case("vgg16-128@16", 1, 128, 128, (16, 16)),
    Case("vgg16-512@4", 1, 512, 512, (4, 4)),
)
"""Of the networks for images of 32 x 32."""


class Entry(NamedTuple):
    """A layer, its dtype, and who computes it."""

    case: Case
    dtype: torch.dtype
    names: tuple[str, ...]


# Small, for correctness alone. The wide ones suit descriptors.
CHECKED = (
    *(
        Entry(case, dtype, ("flat",))
        for case in SMALL
        for dtype in (torch.float32, torch.float16)
        if case.name in ("odd-pixels", "odd-channels", "stride-2-odd", "dilated", "alpha-1")
    ),
    *(
        Entry(case, dtype, ("flat", "descriptor"))
        for dtype in (torch.float16, torch.bfloat16)
        for case in (
            Case("wide", 3, 64, 64, (7, 6)),
            Case("wide-stride-2", 2, 64, 128, (6, 8), stride=(2, 2)),
            Case("wide-groups", 2, 128, 128, (9, 8), groups=4),
            Case("wide-alpha-1/4", 2, 128, 64, (5, 9), alpha=0.25),
        )
    ),
)


def checked(*, rehearsal: bool) -> Sequence[Entry]:
    if not rehearsal:
        return CHECKED
    wide = Case("wide", 1, 64, 64, (1, 2))
    return [Entry(TINY, torch.float32, ("flat",)), Entry(wide, torch.float16, ("descriptor",))]


def layers(*, rehearsal: bool) -> list[Entry]:
    """The layers that the speed claims are made on."""
    found = _sized(RESNET50, LARGE, torch.float16, (*FEW, *COMPILED, "separate", "flat"), rehearsal)
    return found if rehearsal else found + _sized(RESNET50, MIDDLE, torch.float16, FEW, rehearsal)


def single(*, rehearsal: bool) -> list[Entry]:
    """The same for one image."""
    return _sized(RESNET50, 1, torch.float16, FEW if rehearsal else (*FEW, *COMPILED, "separate"), rehearsal)


def others(*, rehearsal: bool) -> list[Entry]:
    """The same in the other dtypes, and layers of other networks."""
    found = _sized(OTHERS, LARGE, torch.float16, FEW, rehearsal)
    for dtype in () if rehearsal else (torch.bfloat16, torch.float32):
        found += _sized(RESNET50, MIDDLE, dtype, FEW, rehearsal)
    return found


def network() -> list[Entry]:
    """The layers that SPConv takes over in ResNet-50, as they are trained and run."""
    cases = (*RESNET50, *TRANSITIONS)
    return [
        Entry(replace(case, batch=batch), dtype, ("triton",))
        for batch, dtype in ((NETWORK, torch.bfloat16), (1, torch.float16))
        for case in cases
    ]


def _sized(
    cases: Sequence[Case], batch: int, dtype: torch.dtype, names: tuple[str, ...], rehearsal: bool
) -> list[Entry]:
    if rehearsal:
        return [Entry(TINY, torch.float32, names)]
    return [Entry(replace(case, batch=batch), dtype, names) for case in cases]
