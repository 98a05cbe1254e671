"""What every call checks about its tensors, before any of them is read."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_one_of
from .epilogue import ACTIVATIONS
from .geometry import Geometry

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape(tensor: Tensor) -> list[int]:
    """Sizes as plain ints, so that a message reads the same inside ``torch.compile`` with dynamic shapes."""
    return [int(size) for size in tensor.shape]


def check_input(name: str, x: Tensor) -> None:
    """``x`` is a dense floating-point [N, C, H, W] tensor.

    Raises:
        TypeError: not a tensor, sparse or of another layout, or not of a dtype in ``FLOATING``.
        ValueError: not of rank 4.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    _check_dense(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions [N, C, H, W], got {x.dim()}: {shape(x)}")


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        got = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be dense, with layout torch.strided, got {got}")


def check_alike(name: str, tensor: Tensor, x_name: str, x: Tensor, *, or_float32: bool = False) -> None:
    """``tensor`` is dense, and has the dtype and the device of ``x``.

    Raises:
        TypeError: not a tensor, sparse or of another layout, or another dtype.
        ValueError: another device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype != x.dtype and not (or_float32 and tensor.dtype == torch.float32):
        raise TypeError(f"{name} must have the dtype of {x_name}, {x.dtype}, got {tensor.dtype}")
    _check_dense(name, tensor)
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of {x_name}, {x.device}, got {tensor.device}")


def check_kernel_weight(weight_gwc: Tensor) -> None:
    """``weight_gwc`` has the rank from which the kernel size can be read.

    Raises:
        TypeError: not a tensor.
        ValueError: not of rank 4.
    """
    if not isinstance(weight_gwc, Tensor):
        raise TypeError(f"weight_gwc must be a torch.Tensor, got {type(weight_gwc).__name__}")
    if weight_gwc.dim() != 4:
        raise ValueError(
            f"weight_gwc must have 4 dimensions [M, alpha L / G, k, k], got {weight_gwc.dim()}: {shape(weight_gwc)}"
        )


def check_representative(x_name: str, x: Tensor, weight_gwc: Tensor, weight_pwc: Tensor, geometry: Geometry) -> None:
    """The weights of the representative branch fit each other and ``groups``; the window fits the input.

    Raises:
        TypeError: dtypes that differ.
        ValueError: shapes, devices or group counts that do not fit, or a window larger than the padded input.
    """
    check_alike("weight_gwc", weight_gwc, x_name, x)
    check_alike("weight_pwc", weight_pwc, x_name, x)
    outputs, groups = weight_gwc.shape[0], geometry.groups
    if outputs == 0:
        raise ValueError(f"weight_gwc must have at least one output channel, got {shape(weight_gwc)}")
    if weight_pwc.dim() != 4 or weight_pwc.shape[0] != outputs or weight_pwc.shape[2:] != (1, 1):
        raise ValueError(
            f"weight_pwc must be [{int(outputs)}, alpha L, 1, 1] as weight_gwc is, got {shape(weight_pwc)}"
        )
    representative = weight_pwc.shape[1]
    if representative % groups or outputs % groups:
        raise ValueError(
            f"groups must divide the representative channels, {int(representative)}, and the output channels, "
            f"{int(outputs)}, got {groups}"
        )
    if weight_gwc.shape[1] * groups != representative or representative == 0:
        raise ValueError(
            f"weight_gwc must be [M, alpha L / G, k, k] with alpha L = {int(representative)} (from weight_pwc) and "
            f"G = {groups}, got {shape(weight_gwc)}"
        )
    check_window(x_name, x, geometry)


def check_window(x_name: str, x: Tensor, geometry: Geometry) -> None:
    """``x`` has pixels, and the window fits the padded input.

    Raises:
        ValueError: it does not.
    """
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{x_name} must have at least one pixel, got {shape(x)}")
    height, width = geometry.output_size(x.shape[2], x.shape[3])
    if height < 1 or width < 1:
        raise ValueError(
            f"{x_name} is smaller than the window: {shape(x)[2:]} with kernel_size {geometry.kernel_size}, padding "
            f"{geometry.padding} and dilation {geometry.dilation} leaves no output pixel"
        )


def check_padding(x: Tensor, padding: tuple[int, int], mode: str) -> None:
    """``x``, [N, C, H, W], has the pixels that a ``padding_mode`` of ``nn.Conv2d`` pads with.

    Raises:
        ValueError: it has not.
    """
    for size, pad in zip(x.shape[2:], padding, strict=True):
        least = {"reflect": pad + 1, "circular": pad}.get(mode, 1)
        if pad and size < max(least, 1):
            raise ValueError(
                f"x must have {least} or more pixels along an axis for padding_mode={mode!r} and padding {padding}, "
                f"got {shape(x)[2:]}"
            )


def check_pointwise_weight(name: str, weight: Tensor, channels: int, x_name: str) -> None:
    """``weight`` is [M, channels, 1, 1], M and the channels at least 1.

    Raises:
        ValueError: it is not.
    """
    if weight.dim() != 4 or weight.shape[2:] != (1, 1):
        raise ValueError(f"{name} must be [M, {int(channels)}, 1, 1], got {shape(weight)}")
    if weight.shape[1] != channels:
        raise ValueError(f"{x_name} must have the {int(weight.shape[1])} channels of {name}, got {int(channels)}")
    if weight.shape[0] == 0 or channels == 0:
        raise ValueError(f"{name} must have at least one output and one input channel, got {shape(weight)}")


def check_redundant(x: Tensor, weight_redundant: Tensor | None, weight_pwc: Tensor) -> None:
    """``weight_redundant`` takes the channels that the representative branch leaves.

    Raises:
        TypeError: another dtype.
        ValueError: another shape or device, or None though channels remain.
    """
    outputs, representative = weight_pwc.shape[:2]
    redundant = x.shape[1] - representative
    if redundant < 0:
        raise ValueError(
            f"x must have at least the {int(representative)} representative channels of weight_pwc, "
            f"got {int(x.shape[1])} channels: {shape(x)}"
        )
    if weight_redundant is None:
        if redundant:
            raise ValueError(
                f"x must have {int(representative)} channels where weight_redundant is None, "
                f"got {int(x.shape[1])} channels: {shape(x)}"
            )
        return
    check_alike("weight_redundant", weight_redundant, "x", x)
    if weight_redundant.dim() != 4 or weight_redundant.shape[0] != outputs or weight_redundant.shape[2:] != (1, 1):
        raise ValueError(f"weight_redundant must be [{int(outputs)}, L - alpha L, 1, 1], got {shape(weight_redundant)}")
    if weight_redundant.shape[1] != redundant:
        raise ValueError(
            f"x must have {int(representative + weight_redundant.shape[1])} channels "
            f"({int(representative)} representative and {int(weight_redundant.shape[1])} redundant), "
            f"got {int(x.shape[1])}: {shape(x)}"
        )


def check_bias(name: str, bias: Tensor | None, expected: tuple[int, ...], x: Tensor, *, or_float32: bool) -> None:
    """``bias`` is None or of the ``expected`` shape.

    Raises:
        TypeError: another dtype.
        ValueError: another shape or device.
    """
    if bias is None:
        return
    check_alike(name, bias, "x", x, or_float32=or_float32)
    if tuple(bias.shape) != expected:
        raise ValueError(f"{name} must be {list(map(int, expected))}, got {shape(bias)}")


def check_norm(name: str, norm: object, outputs: int, x: Tensor) -> None:
    """``norm`` is the weight and the bias of a batch norm, each [M] or None.

    Raises:
        TypeError: not a pair, or a tensor of another dtype.
        ValueError: another shape or device.
    """
    if not isinstance(norm, (tuple, list)) or len(norm) != 2:
        got = f"{len(norm)} of them" if isinstance(norm, (tuple, list)) else type(norm).__name__
        raise TypeError(f"{name} must be a pair of a weight and a bias, got {got}")
    for tensor in norm:
        check_bias(name, tensor, (outputs,), x, or_float32=True)


def check_eps(eps: object) -> None:
    """``eps`` is a number of at least 0 for either norm.

    Raises:
        TypeError: not a pair of numbers.
        ValueError: below 0.
    """
    if not isinstance(eps, (tuple, list)) or len(eps) != 2 or not all(isinstance(value, (int, float)) for value in eps):
        raise TypeError(f"eps must be a pair of numbers, got {eps!r}")
    if min(eps) < 0:
        raise ValueError(f"eps must be at least 0, got {eps!r}")


def check_epilogue(residual: Tensor | None, activation: str, x: Tensor, output: tuple[int, ...]) -> None:
    """``residual`` is None or has the shape of the output, and the ``activation`` is one that is known.

    Raises:
        TypeError: a residual of another dtype.
        ValueError: another shape or device, or an unknown activation.
    """
    check_one_of("activation", activation, ACTIVATIONS)
    if residual is None:
        return
    check_alike("residual", residual, "x", x)
    if tuple(residual.shape) != output:
        raise ValueError(f"residual must have the shape of the output, {list(map(int, output))}, got {shape(residual)}")


def check_no_gradients(function: str, tensors: dict[str, Tensor | None]) -> None:
    """Nobody will ask for gradients by these arguments.

    Raises:
        ValueError: gradients are enabled, and a tensor requires them.
    """
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} must not require gradients, which {function} does not have: call it under "
                "torch.inference_mode() or torch.no_grad(); to train, use spconv2d, or the model as it was before fuse"
            )


def check_fusion(u3: Tensor, u1: Tensor) -> None:
    """The two branches agree.

    Raises:
        TypeError: not floating-point tensors of one dtype.
        ValueError: shapes or devices that differ.
    """
    check_input("u3", u3)
    check_alike("u1", u1, "u3", u3)
    if u1.shape != u3.shape:
        raise ValueError(f"u1 must have the shape of u3, {shape(u3)}, got {shape(u1)}")
    if u3.shape[2] * u3.shape[3] == 0:
        raise ValueError(f"u3 must have at least one pixel to average over, got {shape(u3)}")
