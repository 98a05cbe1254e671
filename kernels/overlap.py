"""Kernels that begin while the one ahead of them still runs: programmatic dependent launches, on Hopper and newer.

A kernel that is launched so begins once every program ahead of it has called :func:`let_next_begin`, or has ended.
What those write is there once :func:`wait_for_previous` returns, not before; what was there when *they* stopped
waiting is there from the beginning. Launched in the ordinary way, or with OVERLAP false, a kernel has nothing to wait
for, and the next one begins when it has ended.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Until the kernel ahead has ended, all of it."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def let_next_begin(OVERLAP: tl.constexpr):
    """Once every program has called this."""
    if OVERLAP:
        gdc_launch_dependents()
