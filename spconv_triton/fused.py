"""An SPConv layer in inference with what follows it, as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .arguments import check_one_of
from .autocast import computed_dtype
from .branch_norm import affine_map, fold_branch_norms, is_affine, norm_misfit, scaled
from .checks import check_input, check_padding
from .epilogue import ACTIVATIONS, Epilogue, activate
from .geometry import Geometry
from .layout import padded_by_mode
from .modules import SPConv2d, layer_repr
from .native.inference import Inference
from .symbols import call_of, is_symbol

BUFFERS = dict.fromkeys(("weight_gwc", "weight_pwc", "weight_redundant", "bias", "branch_bias", "norm_scale")).keys()
"""Of a fused layer, in the order of what takes them; as :data:`spconv_triton.modules.TENSORS`."""

IN_PLACE = ("", "output", "residual")
"""What the sum of output and residual may be written over; at first over neither."""


class FusedSPConv2d(nn.Module):
    """Y = activation(norm(layer(x)) + residual): what :func:`spconv_triton.fuse` puts in the place of a layer.

    Everything is a buffer: there is nothing to train. Norms in the branches are folded into the weights, and so is the
    norm that follows where there is no gate (alpha = 1); else its scale is kept apart.

    Args:
        layer: in eval mode; copied.
        norm: the batch norm that follows, in eval mode with running statistics; None without.
        activation: ``"none"``, ``"relu"``, ``"relu6"`` or ``"silu"``.
        residual: whether the layer is called with one; for ``repr``.
        in_place: what the sum is written over, ``"output"`` or ``"residual"``, whose dtype it then has; else empty.

    Shape:
        input [N, L, H, W] and maybe a residual [N, M, H_out, W_out] -> [N, M, H_out, W_out], in a dtype as of the
        layer. A residual of another shape or dtype is added as PyTorch would, after the layer.

    Attributes:
        weight_gwc, weight_pwc, weight_redundant: as of the layer.
        bias: [M] or None; in float32 or better where a norm is folded into it, else in the dtype of the layer's.
        norm_scale: [M] or None, in float32 or better; see :func:`spconv_triton.functional.spconv2d_inference`.
        branch_bias: [2, M] or None, in float32 or better.

    Raises:
        TypeError: ``layer`` is not an SPConv2d.
        ValueError: a layer in training mode, norms that are no affine maps or do not fit the layer, or an unknown
            activation or ``in_place``.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    weight_gwc: Tensor
    weight_pwc: Tensor
    weight_redundant: Tensor | None
    bias: Tensor | None
    branch_bias: Tensor | None
    norm_scale: Tensor | None

    def __init__(
        self,
        layer: SPConv2d,
        norm: nn.Module | None = None,
        activation: str = "none",
        *,
        residual: bool = False,
        in_place: str = "",
    ) -> None:
        super().__init__()
        if not isinstance(layer, SPConv2d):
            raise TypeError(f"layer must be an SPConv2d, got {type(layer).__name__}")
        if layer.training:
            raise ValueError("layer must be in eval mode, got one in training mode: call .eval() on the model first")
        check_one_of("activation", activation, ACTIVATIONS)
        check_one_of("in_place", in_place, IN_PLACE)
        if isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)) and is_affine(norm):
            reason = norm_misfit(norm, layer.weight_gwc, layer.out_channels)
            if reason:
                raise ValueError(f"norm must fit the layer, got one that {reason}: {norm}")
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "alpha"):
            setattr(self, name, getattr(layer, name))
        self.padding_mode, self.backend = layer.padding_mode, layer.backend
        self.geometry: Geometry = layer.geometry
        self.activation = activation
        self.has_residual = residual
        self.in_place = in_place
        self.has_norm = norm is not None
        self._inference = Inference()
        with torch.no_grad():
            for name, tensor in _folded(layer, norm).items():
                self.register_buffer(name, None if tensor is None else tensor.detach().clone())
        super().train(False)

    def forward(self, input: Tensor, residual: Tensor | float | None = None) -> Tensor:
        """activation(norm_scale (beta U3 + gamma U1) + bias + residual): [N, L, H, W] -> [N, M, H_out, W_out].

        Args:
            input: called what the layer calls it.
            residual: None without; a number or a map of another shape or dtype is added after the layer.

        Returns:
            The output, in the memory format of ``input``, and in its dtype unless a residual of another is added.

        Raises:
            TypeError, ValueError: as of the layer.
        """
        if is_symbol(input, residual):
            return call_of(self, input) if residual is None else call_of(self, input, residual)
        x = input
        fitting = residual if isinstance(residual, Tensor) and self._fits(x, residual) else None
        activation = self.activation if residual is fitting else "none"  # else it waits for the residual
        padding = self.geometry.padding
        if self.padding_mode != "zeros":
            check_input("x", x)
            check_padding(x, padding, self.padding_mode)
            x = padded_by_mode(x, padding, self.padding_mode)
            padding = (0, 0)
        inference = None if torch.compiler.is_compiling() else self._inference
        buffers: dict[str, Any] = self._buffers
        if buffers.keys() >= BUFFERS:
            *tensors, norm_scale = map(buffers.__getitem__, BUFFERS)  # as attributes they would be searched for
        else:  # some are computed (parametrized)
            *tensors, norm_scale = (getattr(self, name) for name in BUFFERS)
            inference = None
        y = functional.inference_forward(
            (x, *tensors),
            (self.geometry.stride, padding, self.geometry.dilation, self.geometry.groups),
            Epilogue(norm_scale, fitting, activation),
            self.backend,
            inference,
        )
        if residual is None or fitting is not None:
            return y
        added = y + residual
        if self.in_place:
            written = residual if self.in_place == "residual" and isinstance(residual, Tensor) else y
            added = added.to(written.dtype)
        return activate(added, self.activation)

    def _fits(self, x: Tensor, residual: Tensor) -> bool:
        """Whether the residual is a map of the output's shape, dtype and device."""
        check_input("x", x)
        if x.dim() != 4 or residual.device != x.device or residual.dtype != computed_dtype(x):
            return False
        return residual.shape == (x.shape[0], self.weight_gwc.shape[0], *self.geometry.output_size(*x.shape[2:]))

    def train(self, mode: bool = True) -> FusedSPConv2d:
        """Raises ValueError unless ``mode`` is False: the norms are folded away, and there is nothing to train."""
        if mode:
            raise ValueError(
                "mode must be False for a fused layer, which cannot be trained, got True: train the model that was "
                "given to spconv_triton.fuse, which is as it was, and fuse it again"
            )
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> FusedSPConv2d:
        """Of ``.to()`` and its like, as of the layer."""
        self._inference.forget()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return layer_repr(
            self,
            branch_norm=self.branch_bias is not None,
            norm=self.has_norm,
            residual=self.has_residual,
            activation=self.activation,
        )


def _folded(layer: SPConv2d, norm: nn.Module | None) -> dict[str, Tensor | None]:
    """The buffers."""
    gwc, pwc, redundant, bias = layer.weight_gwc, layer.weight_pwc, layer.weight_redundant, layer.bias
    branch_bias = norm_scale = None
    if layer.branch_norm:
        gwc, pwc, redundant, branch_bias = fold_branch_norms(layer)
    if branch_bias is not None and redundant is None:  # no gate: one bias is as good as two
        bias = branch_bias[0] if bias is None else branch_bias[0] + bias
        branch_bias = None
    if norm is not None:
        norm_scale, shift = affine_map("norm", norm)
        bias = shift if bias is None else torch.addcmul(shift, norm_scale, bias.to(shift.dtype))
    if norm_scale is not None and redundant is None:
        gwc, pwc, norm_scale = scaled(gwc, norm_scale), scaled(pwc, norm_scale), None
    return {
        "weight_gwc": gwc,
        "weight_pwc": pwc,
        "weight_redundant": redundant,
        "bias": bias,
        "branch_bias": branch_bias,
        "norm_scale": norm_scale,
    }
