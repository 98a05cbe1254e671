"""From tensors to kernels: allocation, strides, grids. The only importer of the kernels.

Every function takes and returns plain tensors; differentiation and registration are :mod:`spconv_triton.ops`'s, but
for ``opaque``, which registers the three operators whose arguments are host descriptors.
Activations are channels_last, and so is the group-wise weight; what comes in another layout is copied.

All modules but ``opaque`` import triton and build the kernels, so each is imported when it is first used: on a CPU
never, unless it interprets them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import branch, branch_norm, common, descriptor, fusion, gradients, gradients_descriptor, layer, opaque
    from .branch import representative_branch, representative_branch_backward
    from .branch_norm import Kept, Norms, empty_kept, spconv2d_batch_norm, spconv2d_batch_norm_backward
    from .common import empty_channels_last, empty_output
    from .fusion import gap_softmax_fusion, gap_softmax_fusion_backward
    from .gradients import spconv2d_backward
    from .inventory import KERNELS, TUNED_KERNELS
    from .layer import spconv2d

_CONTENTS = {
    "branch": ("representative_branch", "representative_branch_backward"),
    "branch_norm": ("Kept", "Norms", "empty_kept", "spconv2d_batch_norm", "spconv2d_batch_norm_backward"),
    "common": ("empty_channels_last", "empty_output"),
    "descriptor": (),
    "fusion": ("gap_softmax_fusion", "gap_softmax_fusion_backward"),
    "gradients": ("spconv2d_backward",),
    "gradients_descriptor": (),
    "layer": ("spconv2d",),
    "opaque": (),
    "inventory": ("KERNELS", "TUNED_KERNELS"),
}
_HOMES = {name: module for module, names in _CONTENTS.items() for name in names}

__all__ = [
    "KERNELS",
    "TUNED_KERNELS",
    "Kept",
    "Norms",
    "branch",
    "branch_norm",
    "common",
    "descriptor",
    "empty_channels_last",
    "empty_kept",
    "empty_output",
    "fusion",
    "gap_softmax_fusion",
    "gap_softmax_fusion_backward",
    "gradients",
    "gradients_descriptor",
    "layer",
    "opaque",
    "representative_branch",
    "representative_branch_backward",
    "spconv2d",
    "spconv2d_backward",
    "spconv2d_batch_norm",
    "spconv2d_batch_norm_backward",
]


def __getattr__(name: str) -> Any:
    if name in _CONTENTS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
