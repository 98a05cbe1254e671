"""The whole layer in one convolution kernel, for GPUs with tensor-map loads and warp-group products:
Hopper and data-centre Blackwell.

The same equation as :mod:`.onepass`, as a transposed implicit GEMM

    acc[m, pixel] = packed[m, K] . X^T[K, pixel],        K = [off-group Wp | taps | W1]  (see :mod:`.packing`)

over host tensor descriptors of channels_last activations. A tile of pixels is a box BLOCK_N x BLOCK_H x BLOCK_W, each
tap's operand is that box moved by the tap, and the zeros that the hardware fills in outside the tensor are the padding:
the loop over K has no masks and no pointers. Transposed, because the box then is the second operand, which the tensor
cores read from shared memory as it lies; as the first it would pass through registers.

The representative channels come first, for their sum needs no gate. It is divided by ratio before the redundant ones
are added, and all of it multiplied by ratio in the end. With OVERLAP a program begins while the gate is still being
computed, and waits for it where it needs it.

At stride 2, for even H and W, x is viewed as [N, H/2, 2, W/2, 2C], where every tap is again a moved box, and the four
pixels that the point-wise convolutions average are four taps.
"""

import triton
import triton.language as tl

from .epilogue import activate
from .overlap import wait_for_previous
from .tiles import dot, tap_box

LEAST = tl.constexpr(1e-26)
"""The smallest ratio that is divided by. Its gamma, 1e-26, shows in no output; :mod:`.gate` has the other end."""


@triton.jit
def inverse(ratio):
    """1 / ratio, finite. NaN may become anything: the scale is NaN there too."""
    return 1.0 / tl.maximum(ratio, LEAST)


@triton.jit
def gate_plane(
    plane_ptr,  # [N, CO] float32
    first_sample,
    co,  # [BLOCK_CO]
    N,
    CO: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """[BLOCK_CO, BLOCK_N] of the plane, 0 behind the last sample."""
    sample = tl.arange(0, BLOCK_N)
    pointers = plane_ptr + first_sample.to(tl.int64) * CO + sample[None, :] * CO + co[:, None]
    return tl.load(pointers, mask=(first_sample + sample < N)[None, :], other=0.0)


@triton.jit
def times(
    acc,  # [BLOCK_CO, BLOCK_N PIXELS]
    plane,  # [BLOCK_CO, BLOCK_N]
    BLOCK_CO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """acc times its sample's column of the plane. A load for each pixel would take half as many registers again."""
    return (acc.reshape(BLOCK_CO, BLOCK_N, PIXELS) * plane[:, :, None]).reshape(BLOCK_CO, BLOCK_N * PIXELS)


@triton.jit
def plus(acc, plane, BLOCK_CO: tl.constexpr, BLOCK_N: tl.constexpr, PIXELS: tl.constexpr):
    """As :func:`times`, a sum."""
    return (acc.reshape(BLOCK_CO, BLOCK_N, PIXELS) + plane[:, :, None]).reshape(BLOCK_CO, BLOCK_N * PIXELS)


@triton.jit(do_not_specialize=["N", "HO", "WO"])
def onepass_descriptor(
    x_desc,  # [N, H, W, C] in boxes [BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_K]; at stride 2 see tap_box
    packed_desc,  # [CO, (CR - CG') + 9 CG' + (C - CR)] in boxes [BLOCK_CO, BLOCK_K], CG' = MERGE CR / G
    ratio_ptr,  # [N, CO] float32
    scale_ptr,  # [N, CO] float32
    offset_ptr,  # [N, CO] float32
    residual_desc,  # [N, HO, WO, CO] in boxes [BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_CO]; read only if RESIDUAL
    y_desc,  # likewise
    N,
    HO,
    WO,
    C: tl.constexpr,
    CR: tl.constexpr,
    CO: tl.constexpr,
    G: tl.constexpr,
    MERGE: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,  # see epilogue
    OVERLAP: tl.constexpr,  # see overlap
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (sample blocks x row blocks x column blocks x output-channel blocks,), output channels fastest.

    Samples go backwards: the last ones are what the statistics pass left in the L2 cache.
    """
    CG: tl.constexpr = CR // G * MERGE
    COG: tl.constexpr = CO // G * MERGE
    CO_BLOCKS: tl.constexpr = CO // BLOCK_CO
    PIXELS: tl.constexpr = BLOCK_H * BLOCK_W
    BLOCK_PIX: tl.constexpr = BLOCK_N * PIXELS
    WINDOW: tl.constexpr = STRIDE * STRIDE  # pixels that a point-wise convolution averages
    POINTWISE: tl.constexpr = CR - CG
    REDUNDANT: tl.constexpr = POINTWISE + 9 * CG  # the column at which the redundant channels' weights begin
    PW_STEPS: tl.constexpr = POINTWISE // BLOCK_K * WINDOW
    RED_FROM: tl.constexpr = PW_STEPS + 9 * CG // BLOCK_K  # the step at which those channels begin
    STEPS: tl.constexpr = RED_FROM + (C - CR) // BLOCK_K * WINDOW

    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    block = tile // CO_BLOCKS
    row_blocks = tl.cdiv(HO, BLOCK_H)
    column_blocks = tl.cdiv(WO, BLOCK_W)
    co0 = tile % CO_BLOCKS * BLOCK_CO
    group = co0 // COG
    column0 = block % column_blocks * BLOCK_W
    row0 = block // column_blocks % row_blocks * BLOCK_H
    n0 = block // (column_blocks * row_blocks) * BLOCK_N
    co = co0 + tl.arange(0, BLOCK_CO)

    acc = tl.zeros((BLOCK_CO, BLOCK_PIX), tl.float32)
    ratio = tl.zeros((BLOCK_CO, BLOCK_N), tl.float32)  # with OVERLAP
    for step in range(0, STEPS):
        redundant = step >= RED_FROM
        averaged = redundant  # by a point-wise convolution
        if PW_STEPS > 0:
            averaged |= step < PW_STEPS
        of_tap = (step - PW_STEPS) * BLOCK_K
        k = POINTWISE + of_tap
        window_tap = 4
        if STRIDE == 2:
            k = tl.where(averaged, step // WINDOW * BLOCK_K, k)
            k = tl.where(redundant, REDUNDANT + (step - RED_FROM) // WINDOW * BLOCK_K, k)
            window_tap += step % 4 + step % 4 // 2  # 4, 5, 7 or 8, in whatever order
        tap = tl.where(averaged, window_tap, of_tap // CG)
        tap_row = tap * 11 >> 5  # tap // 3, for 0 to 8, in fewer instructions
        tap_column = tap - tap_row * 3
        channel = group * CG
        if CG > BLOCK_K:
            channel += k % CG
        if PW_STEPS > 0:
            channel = tl.where(averaged, (k + (group + 1) * CG) % CR, channel)
        channel = tl.where(redundant, k - (REDUNDANT - CR), channel)
        if OVERLAP:
            if step == RED_FROM - 2:  # so that it is there when it is wanted
                wait_for_previous(OVERLAP)
                ratio = gate_plane(ratio_ptr, n0, co, N, CO, BLOCK_N)
            if step == RED_FROM:
                acc = times(acc, inverse(ratio), BLOCK_CO, BLOCK_N, PIXELS)
        elif step == RED_FROM:
            acc = times(acc, inverse(gate_plane(ratio_ptr, n0, co, N, CO, BLOCK_N)), BLOCK_CO, BLOCK_N, PIXELS)
        x = tap_box(x_desc, n0, row0, column0, tap_row, tap_column, channel, C, STRIDE, BLOCK_PIX, BLOCK_K)
        w = packed_desc.load([co0, k])
        acc = dot(w, x.T, acc, PRECISION)

    scale = gate_plane(scale_ptr, n0, co, N, CO, BLOCK_N)
    scale /= inverse(gate_plane(ratio_ptr, n0, co, N, CO, BLOCK_N))
    acc = times(acc, scale, BLOCK_CO, BLOCK_N, PIXELS)
    acc = plus(acc, gate_plane(offset_ptr, n0, co, N, CO, BLOCK_N), BLOCK_CO, BLOCK_N, PIXELS)
    if RESIDUAL:
        acc += residual_desc.load([n0, row0, column0, co0]).reshape(BLOCK_PIX, BLOCK_CO).T.to(tl.float32)
    acc = activate(acc, ACTIVATION)
    y = acc.to(y_desc.dtype).T.reshape(BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_CO)
    y_desc.store([n0, row0, column0, co0], y)
