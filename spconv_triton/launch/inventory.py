"""The kernels that a graph may see, and which of them have a table to choose from."""

from triton.runtime.autotuner import Autotuner

from . import branch, branch_norm, fusion, gradients, layer

KERNELS = tuple(
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
"""Every kernel but those of descriptors."""

TUNED_KERNELS = tuple(kernel for kernel in KERNELS if isinstance(kernel, Autotuner))
"""Those whose configuration is a row of a table."""
