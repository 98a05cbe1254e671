"""From tensors to kernels: allocation, strides, grids. The only importer of the kernels.

Every function takes and returns plain tensors; differentiation and registration are :mod:`spconv_triton.ops`'s.
Activations are channels_last, and so is the group-wise weight; what comes in another layout is copied.
"""

from . import branch, branch_norm, fusion, gradients, layer
from .branch import representative_branch, representative_branch_backward
from .branch_norm import Kept, Norms, empty_kept, spconv2d_batch_norm, spconv2d_batch_norm_backward
from .common import empty_channels_last, empty_output
from .fusion import gap_softmax_fusion, gap_softmax_fusion_backward
from .gradients import spconv2d_backward
from .layer import spconv2d

TUNED_KERNELS = tuple(
    dict.fromkeys(
        (
            *branch.FORWARD_KERNELS,
            *fusion.FORWARD_KERNELS,
            *fusion.BACKWARD_KERNELS,
            *layer.FORWARD_KERNELS,
            *gradients.KERNELS,
            *branch_norm.FORWARD_KERNELS,
            *branch_norm.BACKWARD_KERNELS,
        )
    )
)
"""Every kernel whose configuration may be tuned."""

__all__ = [
    "TUNED_KERNELS",
    "Kept",
    "Norms",
    "branch",
    "branch_norm",
    "empty_channels_last",
    "empty_kept",
    "empty_output",
    "fusion",
    "gap_softmax_fusion",
    "gap_softmax_fusion_backward",
    "gradients",
    "layer",
    "representative_branch",
    "representative_branch_backward",
    "spconv2d",
    "spconv2d_backward",
    "spconv2d_batch_norm",
    "spconv2d_batch_norm_backward",
]
