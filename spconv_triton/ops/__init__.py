"""The operators ``torch.ops.spconv_triton.*``: schemas, fakes, autograd, FLOP formulas.

They are the Triton kernels as PyTorch sees them. Without triton this package is empty, and
:func:`spconv_triton.dispatch.choose` leads to none of them. One operator more needs no triton: that of
:mod:`spconv_triton.native.traced`, for compiled layers on ATen.
"""

from ..dispatch import HAS_TRITON

__all__: list[str] = []

if HAS_TRITON:
    from . import opaque
    from .branch import representative_branch, representative_branch_backward
    from .branch_norm import spconv2d_batch_norm, spconv2d_batch_norm_backward
    from .fusion import gap_softmax_fusion, gap_softmax_fusion_backward
    from .inference import spconv2d_inference
    from .layer import spconv2d, spconv2d_backward

    __all__ += [
        "gap_softmax_fusion",
        "gap_softmax_fusion_backward",
        "opaque",
        "representative_branch",
        "representative_branch_backward",
        "spconv2d",
        "spconv2d_backward",
        "spconv2d_batch_norm",
        "spconv2d_batch_norm_backward",
        "spconv2d_inference",
    ]
