"""What SPConv is compared with: other ways to make a k x k convolution cheaper, each from its paper's equations."""

from benchmarks.peers.catalogue import LAYERS, NAMES, NETWORKS, TITLES, build_layer, build_network
from benchmarks.peers.counting import count_macs, count_parameters
from benchmarks.peers.layers import Ghost, GroupedShuffle, HetConv, PartialConv, Separable
from benchmarks.peers.octave import Octaves, OctConv, to_octaves

__all__ = [
    "LAYERS",
    "NAMES",
    "NETWORKS",
    "TITLES",
    "Ghost",
    "GroupedShuffle",
    "HetConv",
    "OctConv",
    "Octaves",
    "PartialConv",
    "Separable",
    "build_layer",
    "build_network",
    "count_macs",
    "count_parameters",
    "to_octaves",
]
