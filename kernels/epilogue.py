"""What follows the layer in inference, applied before its output is written: an activation, by name."""

import triton
import triton.language as tl


@triton.jit
def activate(acc, ACTIVATION: tl.constexpr):
    """``"none"``, ``"relu"``, ``"relu6"`` or ``"silu"`` of acc. Comparisons keep NaN, which a maximum may not."""
    if ACTIVATION == "relu":
        acc = tl.where(acc < 0, 0.0, acc)
    elif ACTIVATION == "relu6":
        acc = tl.where(acc < 0, 0.0, tl.where(acc > 6, 6.0, acc))
    elif ACTIVATION == "silu":
        acc = acc * tl.sigmoid(acc)
    return acc
