"""What autograd keeps for a backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks


def kept_bytes(forward: Callable[[], Tensor], beside: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of ``forward``, each storage counted once, whole.

    Args:
        forward: what is called, once.
        beside: whose storages do not count: what lives longer anyway, such as parameters.
    """
    others = {tensor.untyped_storage().data_ptr() for tensor in beside}
    kept: dict[int, UntypedStorage] = {}  # held while they are counted, or an address could be used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in others)
