"""The descriptor kernel for layers so narrow that all their weights fit beside the tiles: rows are streamed.

The convolution of :mod:`.descriptor` loads a pixel's representative channels once for each tap, nine times. Here a
program keeps the weights and walks down the rows of its columns. Row r, loaded once for each tap column, feeds three
output rows at once, r - 1, r and r + 1, whose accumulators move up by one with every step: three loads instead of nine.

One group, or all groups merged; alpha = 1/2, so that one box of channels serves both halves.
"""

import triton
import triton.language as tl

from .descriptor import gate_plane, plus, times
from .epilogue import activate
from .tiles import dot


@triton.jit(do_not_specialize=["N", "H", "W", "rows"])
def onepass_rows(
    x_desc,  # [N, H, W, 2 CR] in boxes [BLOCK_N, 1, BLOCK_W, CR]
    packed_desc,  # [CO, CR + 9 CR] in boxes [CO, CR]
    ratio_ptr,  # [N, CO] float32
    scale_ptr,  # [N, CO] float32
    offset_ptr,  # [N, CO] float32
    y_desc,  # [N, H, W, CO] in boxes [BLOCK_N, 1, BLOCK_W, CO]
    N,
    H,
    W,
    rows,  # of the output, for each program
    CR: tl.constexpr,
    CO: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,  # see epilogue
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Grid: (sample blocks x blocks of rows x column blocks,), columns fastest, samples backwards."""
    BLOCK_PIX: tl.constexpr = BLOCK_N * BLOCK_W
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    column_blocks = tl.cdiv(W, BLOCK_W)
    row_blocks = tl.cdiv(H, rows)
    column0 = tile % column_blocks * BLOCK_W
    first = tile // column_blocks % row_blocks * rows
    last = tl.minimum(first + rows, H)
    n0 = tile // (column_blocks * row_blocks) * BLOCK_N
    co = tl.arange(0, CO)
    ratio = gate_plane(ratio_ptr, n0, co, N, CO, BLOCK_N)
    scale = gate_plane(scale_ptr, n0, co, N, CO, BLOCK_N)
    offset = gate_plane(offset_ptr, n0, co, N, CO, BLOCK_N)
    redundant = packed_desc.load([0, 0])
    w00 = packed_desc.load([0, 1 * CR])
    w01 = packed_desc.load([0, 2 * CR])
    w02 = packed_desc.load([0, 3 * CR])
    w10 = packed_desc.load([0, 4 * CR])
    w11 = packed_desc.load([0, 5 * CR])
    w12 = packed_desc.load([0, 6 * CR])
    w20 = packed_desc.load([0, 7 * CR])
    w21 = packed_desc.load([0, 8 * CR])
    w22 = packed_desc.load([0, 9 * CR])
    zero = tl.zeros((CO, BLOCK_PIX), tl.float32)
    above = zero  # what output row r - 1 has got so far
    here = zero  # and output row r
    for row in range(first - 1, last + 1):
        x0 = x_desc.load([n0, row, column0 - 1, 0]).reshape(BLOCK_PIX, CR).T
        x1 = x_desc.load([n0, row, column0, 0]).reshape(BLOCK_PIX, CR).T
        x2 = x_desc.load([n0, row, column0 + 1, 0]).reshape(BLOCK_PIX, CR).T
        above = dot(w20, x0, above, PRECISION)
        above = dot(w21, x1, above, PRECISION)
        above = dot(w22, x2, above, PRECISION)
        here = dot(w10, x0, here, PRECISION)
        here = dot(w11, x1, here, PRECISION)
        here = dot(w12, x2, here, PRECISION)
        below = dot(w00, x0, zero, PRECISION)
        below = dot(w01, x1, below, PRECISION)
        below = dot(w02, x2, below, PRECISION)
        x_redundant = x_desc.load([n0, row - 1, column0, CR]).reshape(BLOCK_PIX, CR).T
        acc = dot(redundant, x_redundant, zero, PRECISION)
        acc = times(acc, ratio, CO, BLOCK_N, BLOCK_W) + above
        acc = plus(times(acc, scale, CO, BLOCK_N, BLOCK_W), offset, CO, BLOCK_N, BLOCK_W)
        acc = activate(acc, ACTIVATION)
        # The first two steps finish no row of this program: they store beyond the last one, which writes nothing.
        out = tl.where(row > first, row - 1, H)
        y_desc.store([n0, out, column0, 0], acc.to(y_desc.dtype).T.reshape(BLOCK_N, 1, BLOCK_W, CO))
        above = here
        here = below
