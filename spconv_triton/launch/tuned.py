"""Which kernels have configurations to choose from."""

from . import branch, branch_norm, fusion, gradients, layer

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
