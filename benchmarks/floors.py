"""The least time that a layer can take on a GPU: a model, not a measurement.

A launch lasts as long as its products take at the data sheet's peak of their precision, or as its bytes take at the
data sheet's bandwidth, whichever is longer; a layer lasts as long as its launches one after the other. Between launches
there is nothing: no gap, no ramp, no tail of a last wave, no latency. What passes between the L2 cache and the
processors is counted (:mod:`benchmarks.traffic`), but takes no time here, since no data sheet says how fast it is.

Three ways to compute a layer:

- ``"conv2d"``: ``nn.Conv2d``. Its kernel is not ours, so it is taken to be perfect: it reads x and the weight once,
  writes y once, and multiplies what its equation has, padding included, but no part of a tile beside a tensor. The
  comparison favours it.
- ``"separate"``: SPConv as kernels of its own for each equation, U3 and U1 in memory: our ``branch_forward``, ATen's
  pooling and 1 x 1 convolution (as perfect as conv2d), our two launches of the fusion. Backward likewise, and ATen
  joins the gradients of the representative and the redundant channels.
- ``"onepass"``: our statistics, gate and convolution; backward our four launches, five at a stride.

Of what the tuner may choose among, each launch gets the configuration with the least modelled time, and of equal ones
that which asks for the fewest bytes; a GPU may choose another.

Peaks are the data sheets', without sparsity (A100 80GB SXM, H100 SXM, H200 SXM: "NVIDIA A100 Tensor Core GPU",
"NVIDIA H100 Tensor Core GPU" and "NVIDIA H200 Tensor Core GPU" data sheets), not what a kernel has been seen to reach.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from cases import Case
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import traffic
from benchmarks.competitors import count_macs
from benchmarks.formulas import tap_area
from benchmarks.launches import Launch, LayerTensors, backward_launches, forward_launches, layer_tensors, recording
from benchmarks.tally import Access, Traffic, tensor_of
from spconv_triton import launch
from spconv_triton.geometry import Geometry
from spconv_triton.launch.common import dot_precision, window_constants

PATHS = ("conv2d", "separate", "onepass")
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Device:
    """A GPU, by its data sheet.

    Attributes:
        capability: which of our kernels it gets.
        flops: a second, by precision as in :class:`benchmarks.tally.Traffic`.
        bandwidth: of its memory, bytes a second.
        l2_bytes: size of its L2 cache.
    """

    capability: tuple[int, int]
    flops: dict[str, float]
    bandwidth: float
    l2_bytes: int


def _device(capability: tuple[int, int], half: float, ieee: float, bandwidth: float, l2_bytes: int) -> Device:
    """TF32 has half the peak of half precision; ``x2`` and ``x3`` stand for as many products that make one."""
    peaks = {"half": half, "tf32": half / 2, "ieee": ieee}
    peaks |= {"halfx2": half / 2, "tf32x2": half / 4, "tf32x3": half / 6}
    return Device(capability, {name: peak * 1e12 for name, peak in peaks.items()}, bandwidth * 1e12, l2_bytes)


DEVICES = {
    "A100": _device((8, 0), 312, 19.5, 2.039, 40 * 2**20),
    "H100": _device((9, 0), 989.4, 66.9, 3.35, 50 * 2**20),
    "H200": _device((9, 0), 989.4, 66.9, 4.8, 50 * 2**20),
}


class Step(NamedTuple):
    """A launch: its traffic under each configuration, and whose bytes the arguments are, to know them again."""

    name: str
    candidates: tuple[Traffic, ...]
    tensors: dict[str, Hashable]


def floor_seconds(
    case: Case,
    path: str,
    direction: str,
    device: str,
    dtype: torch.dtype = torch.float16,
    *,
    cached: bool = False,
) -> float:
    """The modelled time of a layer.

    Args:
        case: the layer; ``"conv2d"`` is the dense convolution of the same shape, without groups.
        path: ``"conv2d"``, ``"separate"`` or ``"onepass"``.
        direction: ``"forward"`` (inference), or ``"backward"``: gradients of input and weights, without a forward.
        device: ``"A100"``, ``"H100"`` or ``"H200"``.
        dtype: of activations and weights: float16, bfloat16, or float32, multiplied as PyTorch's setting for
            convolutions says.
        cached: what an earlier launch of the layer has touched costs nothing to read, if all that the layer touches
            fits into the L2 cache. Otherwise every launch reads from memory.

    Raises:
        ValueError: an unknown path, direction or device.
    """
    for name, value, legal in (
        ("path", path, PATHS),
        ("direction", direction, DIRECTIONS),
        ("device", device, DEVICES),
    ):
        if value not in legal:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, legal))}, got {value!r}")
    return sum(seconds for seconds, _ in chosen(case, path, direction, device, dtype, cached=cached))


def chosen(
    case: Case, path: str, direction: str, device: str, dtype: torch.dtype = torch.float16, *, cached: bool = False
) -> list[tuple[float, Traffic]]:
    """Seconds and traffic of each launch, with the configuration that it is modelled with; arguments as above."""
    gpu = DEVICES[device]
    layer = steps(case, path, direction, gpu.capability, dtype)
    known: set[Hashable] = set()
    remembers = cached and footprint(layer) <= gpu.l2_bytes
    result = []
    for step in layer:
        free = {name for name, tensor in step.tensors.items() if remembers and tensor in known}

        def cost(candidate: Traffic, free: set[str] = free) -> tuple[float, int]:
            return _seconds(candidate, gpu, free), candidate.requested

        best = min(step.candidates, key=cost)
        result.append((cost(best)[0], best))
        known |= {step.tensors[name] for name in (*best.loads, *best.stores)}
    return result


def _seconds(candidate: Traffic, device: Device, free: set[str]) -> float:
    moved = candidate.touched - sum(access.touched for name, access in candidate.loads.items() if name in free)
    return max(
        sum(count / device.flops[precision] for precision, count in candidate.flops.items()), moved / device.bandwidth
    )


def footprint(layer: Iterable[Step]) -> int:
    """Bytes of all that the launches touch, each tensor once."""
    sizes: dict[Hashable, int] = {}
    for step in layer:
        for name, access in (*step.candidates[0].loads.items(), *step.candidates[0].stores.items()):
            tensor = step.tensors[name]
            sizes[tensor] = max(sizes.get(tensor, 0), access.touched)
    return sum(sizes.values())


def useful_flops(case: Case, path: str, direction: str) -> int:
    """Two for each multiply-accumulate of the equations, padding included, as publications count.

    Backward has two products, for the input and for the weights, of as many each.
    """
    forward = 2 * count_macs(case, path, "forward")
    return forward if direction == "forward" else 2 * forward


@functools.lru_cache(maxsize=4096)
def steps(
    case: Case, path: str, direction: str, capability: tuple[int, int], dtype: torch.dtype = torch.float16
) -> tuple[Step, ...]:
    """The launches of a layer, in order; what ATen does is a launch each."""
    if path == "conv2d":
        return tuple(_conv2d(case, direction, dtype))
    if path == "separate":
        separate = _separate_forward if direction == "forward" else _separate_backward
        return tuple(separate(case, layer_tensors(case, dtype), capability))
    launches = forward_launches if direction == "forward" else backward_launches
    return tuple(map(_recorded, launches(case, dtype, capability)))


def _conv2d(case: Case, direction: str, dtype: torch.dtype) -> list[Step]:
    """The taps may pass by pixels of x (1 x 1 at stride 2), which then are not read; dx is written whole."""

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    x = empty(case.batch, case.in_channels, *case.size)
    y = empty(case.batch, case.out_channels, *case.output_size())
    weight = empty(case.out_channels, case.in_channels, *case.kernel_size)
    (height, width), (rows, columns) = case.size, case.output_size()
    geometry = Geometry(case.kernel_size, case.stride, case.padding, case.dilation, 1)
    window = SimpleNamespace(H=height, W=width, HO=rows, WO=columns, **window_constants(geometry))
    read = {"x": case.batch * case.in_channels * tap_area(window).touched}
    flops = useful_flops(case, "conv2d", "forward")
    if direction == "forward":
        return [_perfect("convolution", {"x": x, "weight": weight}, {"y": y}, flops, read)]
    return [
        _perfect("input gradient", {"g": y, "weight": weight}, {"dx": torch.empty_like(x)}, flops),
        _perfect("weight gradient", {"g": y, "x": x}, {"dw": torch.empty_like(weight)}, flops, read),
    ]


def _separate_forward(case: Case, t: LayerTensors, capability: tuple[int, int]) -> list[Step]:
    x3, x1, pooled, weight = _branches(case, t)
    u1 = torch.empty_like(t.grad)
    with recording(capability) as found:
        u3 = launch.representative_branch(x3, t.weight_gwc, t.weight_pwc, t.geometry)
        launch.gap_softmax_fusion(u3, u1)
    branch, *fusion = map(_recorded, found)
    pooling = [] if pooled is x1 else [_perfect("pooling", {"x1": x1}, {"pooled": pooled})]
    flops = 2 * u1.numel() * weight.shape[1]
    return [branch, *pooling, _perfect("1 x 1", {"x1": pooled, "weight": weight}, {"u1": u1}, flops), *fusion]


def _separate_backward(case: Case, t: LayerTensors, capability: tuple[int, int]) -> list[Step]:
    x3, x1, pooled, weight = _branches(case, t)  # pooled was kept by the forward
    u3, u1, dx1 = torch.empty_like(t.grad), torch.empty_like(t.grad), torch.empty_like(x1)
    gate = t.x.new_empty((case.batch, case.out_channels), dtype=torch.float32)
    with recording(capability) as found:
        du3, du1 = launch.gap_softmax_fusion_backward(t.grad, u3, u1, gate)
        dx3 = launch.representative_branch_backward(du3, x3, t.weight_gwc, t.weight_pwc, t.geometry)[0]
    flops = 2 * u1.numel() * weight.shape[1]
    d_pooled = dx1 if pooled is x1 else torch.empty_like(pooled)
    spread = [] if pooled is x1 else [_perfect("pooling, backward", {"d_pooled": d_pooled}, {"dx1": dx1})]
    return [
        *map(_recorded, found),
        _perfect("1 x 1 weight gradient", {"g": du1, "x1": pooled}, {"dw": torch.empty_like(weight)}, flops),
        _perfect("1 x 1 input gradient", {"g": du1, "weight": weight}, {"d_pooled": d_pooled}, flops),
        *spread,
        _perfect("concatenation", {"dx3": dx3, "dx1": dx1}, {"dx": torch.empty_like(t.x)}),
    ]


def _branches(case: Case, t: LayerTensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x3, x1, what the 1 x 1 convolution reads of x1 (pooled at a stride), and its weight."""
    if t.weight_redundant is None:
        raise ValueError(f"alpha must be below 1 for a layer with two branches, got {case.alpha}")
    x3, x1 = t.x.split((case.representative, case.in_channels - case.representative), dim=1)
    pooled = x1 if case.stride == (1, 1) else x1.new_empty((case.batch, x1.shape[1], *case.output_size()))
    return x3, x1, pooled, t.weight_redundant


def _recorded(one: Launch) -> Step:
    tensors = {name: _identity(value) for name, value in one.arguments.items() if not isinstance(value, (int, float))}
    return Step(one.name, tuple(traffic.of_launch(one, config) for config in one.configs), tensors)


def _perfect(
    name: str,
    loads: dict[str, Tensor],
    stores: dict[str, Tensor],
    flops: int = 0,
    elements: dict[str, int] | None = None,
) -> Step:
    """A launch that touches every tensor once, or as many ``elements`` of it, and multiplies no more than ``flops``."""

    def once(tensors: dict[str, Tensor]) -> dict[str, Access]:
        counts = {key: (elements or {}).get(key, t.numel()) * t.element_size() for key, t in tensors.items()}
        return {key: Access(count, count) for key, count in counts.items()}

    read = next(iter(loads.values()))
    precision = dot_precision(read) if read.dtype == torch.float32 else "half"
    both = {**loads, **stores}
    return Step(
        name,
        (Traffic(once(loads), once(stores), {precision: flops} if flops else {}),),
        {key: _identity(tensor) for key, tensor in both.items()},
    )


def _identity(value: Tensor | TensorDescriptor) -> tuple[int, int]:
    """Which memory this is; on ``meta`` there are no addresses."""
    tensor = tensor_of(value)
    return tensor.untyped_storage()._cdata, tensor.storage_offset()
