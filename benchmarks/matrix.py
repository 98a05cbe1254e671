"""Every kernel, at every configuration that its launch may choose, on every kind of GPU: what has to compile.

A few layers are enough. The launch code prunes by channels per group, stride, dtype and device, so layers that are wide
enough leave every table whole; narrow, odd and strided ones change what else is compiled in. The descriptor kernels
take their tiles by size as well, and get the sizes that lead to each.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton
from cases import RESNET50, Case

from benchmarks.fingerprint import fingerprint
from benchmarks.launches import (
    CAPABILITIES,
    Launch,
    backward_launches,
    batch_norm_launches,
    forward_launches,
    fusion_launches,
)
from benchmarks.machine_code import TARGETS, MachineCode, compile_kernel, compiling_for, read
from spconv_triton.launch import descriptor, gradients_descriptor
from spconv_triton.launch.common import FEW

PRECISIONS = {
    "float16": (torch.float16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
}
"""Dtype, and how PyTorch is told to multiply float32 in convolutions."""

EVERYWHERE = tuple((target, precision) for target in TARGETS for precision in PRECISIONS)

SOMEWHERE = (("sm_80", "tf32"), ("sm_90", "float16"), ("gfx942", "bfloat16"))
"""For layers that choose nothing that wider ones do not: each kind of tensor core once."""

DESCRIPTOR_TARGETS = ("sm_90", "sm_100")

BATCHES = (1, 8, 32, 64, 128, 256, 320)

SIDES = (7, 14, 28, 56, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 112, 224)
SIZES = (*((side, side) for side in SIDES), (4, 8), (8, 16), (8, 4), (16, 8), (2, 64), (4, 64), (7, 64), (64, 4))
"""Of the outputs that are tried for the sake of a tile: ResNet-50's first."""


class Layer(NamedTuple):
    """A layer, where it is compiled, and what else its launches are told."""

    case: Case
    on: tuple[tuple[str, str], ...]
    options: Mapping[str, Any] = MappingProxyType({})
    only: tuple[str, ...] = ()
    """The kernels that it is compiled for; all if empty."""
    batch_norm: bool = False
    """Whether it is also compiled with batch norms in its branches."""


@dataclass(frozen=True)
class Compilation:
    """One kernel to compile, and where it comes from."""

    kernel: str
    target: str
    precision: str
    layer: str
    flags: str
    blocks: str
    warps: int
    stages: int
    launch: Launch = field(repr=False, compare=False)
    config: triton.Config = field(repr=False, compare=False)

    @property
    def identity(self) -> tuple[str, ...]:
        """What it is called in a report: stays the same when the kernel changes."""
        return (self.kernel, self.target, self.precision, self.layer, self.flags, self.tile)

    @property
    def tile(self) -> str:
        return f"{self.blocks} w{self.warps} s{self.stages}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Stays the same while the machine code does."""
        with multiplying(self.precision):
            arguments = {**self.launch.arguments, **self.launch.constants}
            return fingerprint(self.launch.kernel, self.target, self.config, **arguments)

    def compile(self, *, fresh: bool = False) -> MachineCode:
        """Compile it, and read the result."""
        arguments = {**self.launch.arguments, **self.launch.constants}
        return read(compile_kernel(self.launch.kernel, self.target, self.config, fresh=fresh, **arguments))


@contextlib.contextmanager
def multiplying(precision: str) -> Iterator[torch.dtype]:
    """Have PyTorch multiply float32 as ``precision`` says; yields the dtype."""
    dtype, setting = PRECISIONS[precision]
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = setting
    try:
        yield dtype
    finally:
        convolutions.fp32_precision = before


@functools.cache
def layers() -> tuple[Layer, ...]:
    """Those that the matrix is made of."""
    wide = RESNET50[3]
    odd = replace(wide, name="odd channels", in_channels=502, out_channels=494, alpha=0.502, size=(13, 15))
    flat_only = tuple((target, precision) for target, precision in EVERYWHERE if target in DESCRIPTOR_TARGETS)
    found = [
        Layer(wide, EVERYWHERE, batch_norm=True),
        Layer(strided(wide), EVERYWHERE, followed_by("silu", wide)),
        Layer(replace(wide, name="branch", alpha=1.0), EVERYWHERE),
        Layer(replace(strided(wide), name="branch stride 2", alpha=1.0), SOMEWHERE),
        Layer(odd, (*SOMEWHERE, ("sm_90", "float32"), ("sm_100", "float16"), ("sm_120", "bfloat16")), batch_norm=True),
        Layer(replace(wide, name="residual, silu"), SOMEWHERE, followed_by("silu", wide)),
        Layer(replace(wide, name="residual, relu"), SOMEWHERE, followed_by("relu", wide)),
        Layer(replace(wide, name="residual, relu6"), SOMEWHERE, followed_by("relu6", wide)),
        Layer(replace(strided(wide), name="stride 2, bare"), SOMEWHERE),
        Layer(replace(wide, name="k5", kernel_size=(5, 5), padding=(2, 2)), SOMEWHERE),
        Layer(replace(wide, name="k7", kernel_size=(7, 7), padding=(3, 3)), EVERYWHERE, only=("window_statistics",)),
        Layer(
            replace(strided(wide), name="k7 stride 2", kernel_size=(7, 7), padding=(3, 3)),
            EVERYWHERE,
            only=("window_statistics",),
        ),
        # Steps of other rows: 28 and 56 columns, and few channels.
        *(
            Layer(case, EVERYWHERE, only=("window_statistics",))
            for case in (RESNET50[0], RESNET50[1], strided(RESNET50[1]), Case("resnet20-16@32", 128, 16, 16, (32, 32)))
        ),
        Layer(replace(dilated(wide), name="dilated"), (*flat_only, SOMEWHERE[0], SOMEWHERE[2])),
        Layer(replace(strided(wide), name="stride 3 x 2", stride=(3, 2), size=(14, 15)), SOMEWHERE),
        Layer(replace(wide, name="one group", groups=1, in_channels=128, out_channels=128), SOMEWHERE),
        Layer(Case("resnet20-16@32", 128, 16, 16, (32, 32)), EVERYWHERE, only=("gate_planes",)),  # the shortest steps
        Layer(Case("vgg16-128@112", 8, 128, 128, (112, 112)), EVERYWHERE, only=("gate_planes",)),  # sums in most parts
        Layer(strided(Case("resnet50-128@56", 8, 128, 128, (56, 56))), EVERYWHERE, only=("gate_planes",)),
        Layer(dilated(RESNET50[0]), EVERYWHERE, only=("weight_grad",)),  # rows that wide layers do not choose
        Layer(Case("resnet20-16@32", 128, 16, 16, (32, 32)), SOMEWHERE),
        Layer(strided(Case("resnet20-16-32@32", 128, 16, 32, (32, 32))), SOMEWHERE, batch_norm=True),
    ]
    for case in RESNET50[:3]:
        found += [Layer(case, SOMEWHERE), Layer(strided(case), SOMEWHERE)]
    found += _descriptor_layers()
    return tuple(found)


def followed_by(activation: str, case: Case, *, residual: bool = True) -> dict[str, Any]:
    """Options of a layer with all biases, a norm's scale, maybe a residual, and an activation behind it."""
    scale = torch.empty(case.out_channels, device="meta")
    return {"bias": True, "branch_bias": True, "norm_scale": scale, "residual": residual, "activation": activation}


def strided(case: Case) -> Case:
    """The same at stride 2."""
    return replace(case, name=f"{case.name} stride 2", stride=(2, 2))


def dilated(case: Case) -> Case:
    """The same with dilated taps, which no descriptor kernel takes."""
    return replace(case, name=f"{case.name} dilated", dilation=(2, 2), padding=(2, 2))


def _descriptor_layers() -> Iterator[Layer]:
    """Layers of every tile that a descriptor kernel may take, and of every layout of its weights."""
    kernels = ("onepass_descriptor", "input_grad_descriptor")

    def on(*precisions: str) -> tuple[tuple[str, str], ...]:
        return tuple((target, precision) for target in DESCRIPTOR_TARGETS for precision in precisions)

    halves_and_tf32 = on("float16", "bfloat16", "tf32")
    for case in (RESNET50[0], RESNET50[3]):  # tiles of 64 channels, and of 128
        for sized in _sizes_of_tiles(case, 1, SIZES):
            yield Layer(sized, halves_and_tf32, only=kernels)
        yield from (Layer(sized, on("float16"), only=kernels) for sized in _sizes_of_tiles(case, 2, SIZES))
    for case in (RESNET50[1], RESNET50[2], Case("16 channels a block", 8, 32, 64, (56, 56))):
        yield from (Layer(sized, on("float16"), only=kernels) for sized in _sizes_of_tiles(case, 1))
        yield from (Layer(sized, on("float16"), only=kernels) for sized in _sizes_of_tiles(case, 2))
    for case in RESNET50:
        others = ("weight_grad_descriptor", "gate_planes", "gate_grad", "finish_weights")
        for activation in ("relu", "relu6", "silu"):
            named = replace(case, name=f"{case.name} {activation}", batch=128)
            yield Layer(named, on("float16"), followed_by(activation, case, residual=False), kernels)
            named = replace(case, name=f"{case.name} residual, {activation}", batch=128)
            on_all = halves_and_tf32 if activation == "silu" else on("float16")
            yield Layer(named, on_all, followed_by(activation, case), (*kernels, *others))
        even = replace(case, batch=128, size=(2 * case.size[0], 2 * case.size[1]))
        yield Layer(strided(even), on("float16", "bfloat16"), only=("weight_grad_descriptor", "finish_weights"))


def _sizes_of_tiles(case: Case, stride: int, sizes: Sequence[tuple[int, int]] = ()) -> Iterator[Case]:
    """``case`` at its own output size and at these, at each batch that leads to another tile than those before."""
    forward = _packing(case)
    backward = gradients_descriptor.packing(case.in_channels, case.representative, case.out_channels, case.groups)
    seen: set[Any] = set()
    for height, width in dict.fromkeys(((case.size[0] // stride, case.size[1] // stride), *sizes)):
        for batch in BATCHES:
            output = (batch, height, width, case.out_channels)
            tiles: list[Any] = [(descriptor.best_tile(forward, case.groups, stride, output), batch <= FEW)]
            if backward is not None:
                shape = (batch, case.in_channels, height, width)
                tiles.append(gradients_descriptor.input_tile(backward, shape, case.representative, case.groups, stride))
            if not seen.issuperset(tiles):
                seen.update(tiles)
                size = (height * stride, width * stride)
                name = f"{case.in_channels}-{case.out_channels}@{size[0]}x{size[1]}" + (
                    " stride 2" if stride == 2 else ""
                )
                yield replace(case, name=name, batch=batch, size=size, stride=(stride, stride))


def _packing(case: Case) -> descriptor.Packing:
    found = descriptor.packing(case.in_channels, case.representative, case.out_channels, case.groups)
    assert found is not None, case
    return found


def compilations(targets: Iterable[str] = tuple(TARGETS)) -> Iterator[Compilation]:
    """The matrix, for these targets, each machine code once."""
    seen: set[str] = set()
    for target, precision in itertools.product(targets, PRECISIONS):
        for one in recorded(target, precision):
            if one.fingerprint not in seen:
                seen.add(one.fingerprint)
                yield one


def recorded(target: str, precision: str) -> Iterator[Compilation]:
    """All launches of the layers that are compiled so, in each of their configurations."""
    for layer in layers():
        if (target, precision) in layer.on:
            with multiplying(precision) as dtype, compiling_for(target):
                launches = _launches(layer, dtype, CAPABILITIES[target])
            label = f"{layer.case.name} n{layer.case.batch}"
            for launch in launches:
                if not layer.only or launch.name in layer.only:
                    yield from (of_launch(launch, config, target, precision, label) for config in launch.configs)


def _launches(layer: Layer, dtype: torch.dtype, capability: tuple[int, int] | None) -> list[Launch]:
    branch_bias = layer.options.get("branch_bias", False)
    return [
        *forward_launches(layer.case, dtype, capability, **layer.options),
        *backward_launches(layer.case, dtype, capability, branch_bias=branch_bias),
        *(fusion_launches(layer.case, dtype) if layer.case.alpha == 1 else ()),
        *(batch_norm_launches(layer.case, dtype, capability) if layer.batch_norm else ()),
    ]


def of_launch(launch: Launch, config: triton.Config, target: str, precision: str, layer: str) -> Compilation:
    """A launch in one of its configurations."""
    blocks = {name: value for name, value in launch.constants.items() if name.startswith("BLOCK_")} | config.kwargs
    return Compilation(
        launch.name,
        target,
        precision,
        layer,
        " ".join(filter(None, (_flag(name, value) for name, value in launch.constants.items()))),
        " ".join(f"{name.removeprefix('BLOCK_')}={value}" for name, value in sorted(blocks.items())),
        config.num_warps,
        config.num_stages,
        launch,
        config,
    )


def _flag(name: str, value: Any) -> str:
    """What a constant that switches something is called where it is on."""
    if value is True:
        return name
    return value if isinstance(value, str) and name != "PRECISION" and value != "none" else ""
