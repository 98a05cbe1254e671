"""Every competitor by name, as a layer and in a network."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from benchmarks.peers.layers import Ghost, GroupedShuffle, HetConv, PartialConv, Separable, conv
from benchmarks.peers.octave import OctConv, to_octaves
from spconv_triton import SPConv2d, models
from spconv_triton.models import legal_alpha

Maker = Callable[[int, int, int, int], nn.Module]
"""(in_channels, out_channels, kernel_size, stride) -> a layer without bias that keeps the size, over the stride."""

TITLES = {
    "conv2d": "nn.Conv2d",
    "conv2d compiled": "nn.Conv2d, compiled",
    "spconv": "SPConv, alpha 1/2",
    "spconv kept": "SPConv, alpha 1/2, U3 - U1 kept",
    "spconv compiled": "SPConv, alpha 1/2, compiled",
    "reference": "SPConv reference, eager",
    "reference compiled": "SPConv reference, compiled",
    "ghost": "Ghost module, s 2",
    "ghost compiled": "Ghost module, s 2, compiled",
    "hetconv-p4": "HetConv, P 4",
    "hetconv-p8": "HetConv, P 8",
    "octconv": "OctConv, alpha 1/2",
    "separable": "depthwise-separable",
    "shuffle": "4 groups, shuffled",
    "pconv": "PConv 1/4 + 1 x 1",
}
"""How each is called in tables and pictures."""

NAMES = tuple(TITLES)

COMPILED = " compiled"
"""Ends the name of what goes through ``torch.compile``."""

KEPT = " kept"
"""Ends the name of what trains under ``spconv_triton.set_recompute(False)``."""

VARIANTS = (COMPILED, KEPT)
"""Of a competitor that has a name of its own."""

MIN_CHANNELS = 8
"""Input channels from which a network's convolution is swapped: the first reads an image and stays in all papers but
Ghost's."""

NETWORKS = tuple(models.MODELS)


def _spconv(backend: str) -> Maker:
    def make(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Module:
        return SPConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            kernel_size // 2,
            bias=False,
            alpha=legal_alpha(in_channels, 0.5),
            backend=backend,
        )

    return make


LAYERS: dict[str, Maker] = {
    "conv2d": conv,
    "spconv": _spconv("auto"),
    "reference": _spconv("reference"),
    "ghost": Ghost,
    "hetconv-p4": HetConv,
    "hetconv-p8": lambda *window: HetConv(*window, part=8),
    "octconv": OctConv,
    "separable": Separable,
    "shuffle": GroupedShuffle,
    "pconv": PartialConv,
}
"""The layer as its equations have it. OctConv takes and gives :class:`~benchmarks.peers.octave.Octaves`."""

TRAINED: dict[str, Maker] = {
    **LAYERS,
    "ghost": lambda *window: Ghost(*window, norm=True),
    "separable": lambda *window: Separable(*window, norm=True),
}
"""The layer as its authors train it."""


def build_layer(name: str, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Module:
    """The layer of a competitor; of a variant it is the competitor's, for the caller to compile or call accordingly."""
    return LAYERS[without_variant(name)](in_channels, out_channels, kernel_size, stride)


def without_variant(name: str) -> str:
    """Whose variant it is."""
    return name.partition(" ")[0] if name.endswith(VARIANTS) else name


def build_network(network: str, name: str, *, alpha: float = 0.5, classes: int = 10, in_channels: int = 3) -> nn.Module:
    """A network of the paper with a competitor for its k x k convolutions.

    Args:
        network: of :data:`NETWORKS`.
        name: of :data:`NAMES`; of a variant it is the competitor's, for the caller to compile or call accordingly.
        alpha: of SPConv.

    Raises:
        KeyError: no such network or competitor.
    """
    options = {"classes": classes, "in_channels": in_channels}
    eager = without_variant(name)
    if eager in ("spconv", "reference"):
        backend = "auto" if eager == "spconv" else "reference"
        return models.MODELS[network](alpha, backend=backend, **options)
    vanilla = models.MODELS[network](None, **options)
    if eager == "conv2d":
        return vanilla
    return to_octaves(vanilla) if eager == "octconv" else swap(vanilla, TRAINED[eager])


def swap(network: nn.Module, make: Maker, *, min_channels: int = MIN_CHANNELS, min_size: int = 3) -> nn.Module:
    """Put what ``make`` makes where a convolution of at least so many input channels and k >= ``min_size`` stands."""
    for parent in list(network.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and child.in_channels >= min_channels and child.kernel_size[0] >= min_size:
                setattr(parent, key, make(child.in_channels, child.out_channels, child.kernel_size[0], child.stride[0]))
    return network
