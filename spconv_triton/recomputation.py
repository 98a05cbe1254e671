"""What a layer keeps for the backward in eager mode, where no kernels serve it: memory against time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_recomputes = True


def recomputes() -> bool:
    """Whether a branch, or the difference of both, is computed again in the backward."""
    return _recomputes


def set_recompute(mode: bool) -> contextlib.AbstractContextManager[None]:
    """Whether layers on ATen compute U3 - U1 again in the backward, as they do by default, or keep it from the forward.

    Recomputed, a layer keeps x alone, as ``nn.Conv2d`` does. Without recomputation it keeps one more map, of the size
    of its output, and a training step on a CPU takes a fifth less time: ``benchmarks/README.md``. With batch norms in
    its branches a layer keeps x and U3 in either mode, and it is U1, a few percent of a step.

    It holds for forwards from here on, in every thread of the process; in a ``with`` statement until that ends, like
    ``torch.set_grad_enabled``. It is for eager mode, on a CPU or a GPU that triton does not serve: the Triton kernels
    need neither, and what ``torch.compile`` keeps its ``activation_memory_budget`` says.

    Args:
        mode: True to recompute, False to keep.

    Returns:
        A context manager at whose end the mode before is back; none has to be entered.

    Raises:
        TypeError: ``mode`` is no bool.

    Example::

        spconv_triton.set_recompute(False)  # from here on
        with spconv_triton.set_recompute(True):  # but not of these layers
            maps = early_layers(images)
        network(maps).sum().backward()
    """
    global _recomputes
    if not isinstance(mode, bool):
        raise TypeError(f"mode must be True (recompute) or False (keep), got {type(mode).__name__}")
    previous, _recomputes = _recomputes, mode
    return _until_it_ends(previous)


@contextlib.contextmanager
def _until_it_ends(previous: bool) -> Iterator[None]:
    global _recomputes
    try:
        yield
    finally:
        _recomputes = previous
