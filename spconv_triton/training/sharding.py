"""A network in parts: FSDP2 over the processes of a run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from .processes import Processes


def shard(network: nn.Module, processes: Processes) -> None:
    """Leave each process an equal part of every parameter, in place; a block is gathered while it computes.

    Args:
        network: on its device, the same in every process. Its parameters become contiguous: FSDP2 refuses weights in
            channels_last, as an ``SPConv2d`` has them from the start.
    """
    network.to(memory_format=torch.contiguous_format)
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for block in blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """What is gathered at a time: the members of the outermost sequences that have parameters.

    In a ResNet these are the residual blocks, in a VGG the layers. The rest of the network is gathered as one.
    """
    for child in network.children():
        if not isinstance(network, nn.Sequential):
            yield from blocks(child)
        elif next(child.parameters(), None) is not None:
            yield child
