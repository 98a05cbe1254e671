"""Which layers the kit checks and times, and against whom; in a rehearsal the same lists, short and tiny."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from cases import RESNET50, SMALL, TRANSITIONS, Case

from spconv_triton.launch import descriptor, gradients_descriptor

FEW = ("conv2d", "reference", "triton")
COMPILED = ("reference compiled", "triton compiled")

LARGE, MIDDLE = 128, 32
"""Images in a batch."""

NETWORK = 64
"""Likewise, of the whole network."""

TINY = Case("tiny", 1, 4, 4, (2, 3), kernel_size=(1, 3), padding=(0, 1))
"""Rehearses for all that is timed."""

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
            Case("wide-phases", 2, 128, 128, (16, 62), stride=(2, 2)),
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
    found = _sized(RESNET50, LARGE, torch.float16, FEW, rehearsal)
    if rehearsal:
        return found
    found += _sized(TRANSITIONS, LARGE, torch.float16, FEW, rehearsal)
    return found + _sized(RESNET50, MIDDLE, torch.float16, FEW, rehearsal)


def variants(*, rehearsal: bool) -> list[Entry]:
    """The same compiled, which takes ten seconds a layer, on the flat kernels, and as separate ones."""
    return _sized(RESNET50, LARGE, torch.float16, ("conv2d", *COMPILED, "separate", "flat"), rehearsal)


def single(*, rehearsal: bool) -> list[Entry]:
    """One image."""
    found = _sized(RESNET50, 1, torch.float16, FEW, rehearsal)
    return found if rehearsal else found + _sized(TRANSITIONS, 1, torch.float16, FEW, rehearsal)


def single_variants(*, rehearsal: bool) -> list[Entry]:
    """The same as :func:`variants` of one."""
    return _sized(RESNET50, 1, torch.float16, ("conv2d", *COMPILED, "separate"), rehearsal)


def others(*, rehearsal: bool) -> list[Entry]:
    """The same in the other dtypes, and layers of other networks."""
    found = _sized(OTHERS, LARGE, torch.float16, FEW, rehearsal)
    for dtype in () if rehearsal else (torch.bfloat16, torch.float32):
        found += _sized(RESNET50, MIDDLE, dtype, FEW, rehearsal)
    return found


def parts(*, rehearsal: bool) -> list[Entry]:
    """Those whose kernels are timed one by one."""
    both = ("conv2d", "triton")
    if rehearsal:
        return [Entry(TINY, torch.float32, both)]
    layers = ((RESNET50, LARGE), (TRANSITIONS, LARGE), (RESNET50, 1))
    return [e for cases, batch in layers for e in _sized(cases, batch, torch.float16, both, rehearsal)]


def host(*, rehearsal: bool) -> list[Entry]:
    """Those for which a call is profiled on the host."""
    found = _sized(RESNET50, 1, torch.float16, ("conv2d", "triton"), rehearsal)
    return found[:1] if rehearsal else [found[0], found[-1]]


def tiles(*, rehearsal: bool) -> list[Entry]:
    """Those on whose kernels other tiles are tried."""
    if rehearsal:
        return [Entry(Case("wide", 1, 64, 64, (1, 2)), torch.float16, ())]
    found = [e for batch in (LARGE, MIDDLE, 1) for e in _sized(RESNET50, batch, torch.float16, (), rehearsal)]
    return found + _sized(TRANSITIONS, LARGE, torch.float16, (), rehearsal)


def forward_tiles(packed: descriptor.Packing, outputs: int, groups: int) -> Iterator[descriptor.Tile]:
    """Tiles for the forward, of those that the launch code may choose and around them."""
    wide = outputs // groups * packed.merge % 128 == 0
    shapes = [
        *((64, 64, k, 4, stages) for k, stages in ((32, 4), (32, 6), (64, 3), (64, 4), (64, 6))),
        *((128, 64, k, warps, stages) for k, warps, stages in ((32, 4, 4), (64, 4, 3), (64, 4, 4), (64, 8, 4))),
        *((256, 64, k, warps, stages) for k, warps, stages in ((32, 4, 4), (32, 8, 4), (64, 4, 3), (64, 8, 3))),
        *((32, 64, 64, 4, stages) for stages in (4, 6)),
        *((64, 128, 64, warps, stages) for warps, stages in ((4, 3), (4, 4), (8, 4), (8, 6)) if wide),
        *((128, 128, 64, warps, stages) for warps, stages in ((4, 3), (8, 3), (8, 4), (8, 5)) if wide),
        *((256, 128, 64, 8, stages) for stages in (3, 4) if wide),
        *((32, 128, 64, warps, stages) for warps, stages in ((4, 4), (8, 4)) if wide),
    ]
    for pixels, block_co, block_k, warps, stages in shapes:
        for rows, columns in (*descriptor.BOXES, (4, 8), (2, 4)):
            if block_k <= packed.block_k and 1 <= pixels // (rows * columns) <= 4096 // pixels:
                yield descriptor.Tile(pixels // (rows * columns), rows, columns, block_co, block_k, warps, stages)


def input_tiles(packed: gradients_descriptor.Packing, case: Case) -> Iterator[gradients_descriptor.InputTile]:
    """The same for the input gradient."""
    group = case.representative // case.groups * packed.merge
    most = math.gcd(128, group, case.in_channels - case.representative)
    if packed.mixed or most >= 64:
        block_cs = [64] if packed.mixed else [c for c in (64, 128) if c <= most]
        boxes = ((4, 64), (8, 32), (16, 16), (2, 64), (4, 32), (8, 16), (4, 16), (8, 8), (16, 8))
        for rows, columns in boxes:
            if rows <= 2 * case.output_size()[0] and columns <= 2 * case.output_size()[1]:
                for block_c in block_cs:
                    for warps, stages in ((4, 3), (4, 4), (8, 3), (8, 4)):
                        yield gradients_descriptor.InputTile(True, 1, rows, columns, block_c, 64, warps, stages)
    if packed.mixed:
        return
    boxes_n = ((1, 8, 16), (2, 8, 8), (16, 2, 4), (32, 2, 2), (128, 1, 1), (8, 4, 4), (64, 1, 1), (16, 2, 2), (4, 4, 4))
    for box in boxes_n:
        for block_c in {c for c in (64, 128, most) if c <= most}:
            for warps, stages in ((4, 3), (4, 4), (8, 3), (8, 4)):
                yield gradients_descriptor.InputTile(False, *box, block_c, 64, warps, stages)


def weight_tiles(packed: gradients_descriptor.Packing, case: Case) -> Iterator[gradients_descriptor.WeightTile]:
    """The same for the weight gradient."""
    group, outputs = (c // case.groups * packed.merge for c in (case.representative, case.out_channels))
    most_co = math.gcd(128, outputs)
    rest = case.in_channels - case.representative
    most_c = math.gcd(128, group, case.representative, rest)
    for block_co in (64, 128):
        for block_c in (32, 64, 128):
            if block_co <= most_co and block_c <= most_c:
                for warps, stages in ((4, 3), (4, 4), (4, 6), (8, 3), (8, 4), (8, 6)):
                    yield gradients_descriptor.WeightTile(block_co, block_c, warps, stages)


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
