"""The norms in the branches of a layer, U3 -> norm(U3) and U1 -> norm(U1), as what they compute.

A batch norm on its running statistics is an affine map per channel, s u + t with

    s = weight / sqrt(running_var + eps),    t = bias - s running_mean

and U3 and U1 are linear in their weights, so it folds: the weights' rows times s, and t as a branch bias. A batch norm
on the statistics of the batch needs U3 and U1 themselves; where it :func:`normalises_batch`, the arithmetic can be one
pass, while the state stays the module's. Any other norm is called as the module that it is.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, distributed, nn
from torch.autograd import forward_ad

from .hooks import has_hooks


class Branches(Protocol):
    """What a layer with branch norms has; :class:`spconv_triton.SPConv2d` is one."""

    weight_gwc: Tensor
    weight_pwc: Tensor
    weight_redundant: Tensor | None
    norm_representative: nn.Module | None
    norm_redundant: nn.Module | None


def is_batch_norm(norm: nn.Module) -> bool:
    """Whether ``norm`` computes what ``nn.BatchNorm2d`` or ``nn.SyncBatchNorm`` does: itself one, nothing hooked on."""
    return type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) and not has_hooks(norm)


def is_affine(norm: nn.Module | None) -> bool:
    """Whether ``norm`` is an affine map per channel now: a batch norm in eval mode that has running statistics."""
    if norm is None or norm.training or not is_batch_norm(norm):
        return False
    return norm.running_mean is not None and norm.running_var is not None


def normalises_batch(norm: nn.Module | None) -> bool:
    """Whether ``norm`` is a batch norm that now uses the statistics of the batch, and of this process's alone."""
    if norm is None or not is_batch_norm(norm) or is_affine(norm):
        return False
    if isinstance(norm, nn.SyncBatchNorm) and norm.training and distributed.is_available():
        return not distributed.is_initialized()
    return True


def track(norm: nn.Module, mean: Tensor, variance: Tensor, values: int) -> None:
    """Update the running statistics of a batch norm as its own forward would.

    Args:
        norm: one that :func:`normalises_batch`.
        mean, variance: of the batch, [M], the variance by ``values``.
        values: per channel.
    """
    assert isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
    if not (norm.training and norm.track_running_stats):
        return
    if forward_ad._current_level >= 0:  # statistics have no tangents, which no_grad leaves
        mean, variance = (forward_ad.unpack_dual(value).primal for value in (mean, variance))
    share: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    with torch.no_grad():
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:  # the average over all batches
                share = norm.num_batches_tracked.to(mean.dtype).reciprocal()
        for running, value in ((norm.running_mean, mean), (norm.running_var, variance * (values / (values - 1)))):
            if running is not None:
                running.lerp_(value.to(running.dtype), share.to(running.dtype) if isinstance(share, Tensor) else share)


def folds(layer: Branches) -> bool:
    """Whether :func:`fold_branch_norms` takes the layer as it is now."""
    return is_affine(layer.norm_representative) and (layer.weight_redundant is None or is_affine(layer.norm_redundant))


def fold_branch_norms(layer: Branches) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The norms of a layer folded into its weights: arguments of :func:`spconv_triton.functional.spconv2d`.

    Computed anew from the parameters and statistics as they are, in float32 or better, and differentiable in both.

    Args:
        layer: one that :func:`folds`.

    Returns:
        ``weight_gwc``, ``weight_pwc`` and ``weight_redundant`` (None at alpha = 1), in the shapes, dtypes and strides
        of the layer's, and ``branch_bias``, [2, M] in float32, or float64 where the weights are; its second row is
        zero at alpha = 1.

    Raises:
        ValueError: a norm that is no affine map: in training mode, without running statistics, of another class than
            the two batch norms, or with hooks.
    """
    scale3, shift3 = affine_map("norm_representative", layer.norm_representative)
    gwc, pwc = scaled(layer.weight_gwc, scale3), scaled(layer.weight_pwc, scale3)
    if layer.weight_redundant is None:
        redundant, shift1 = None, torch.zeros_like(shift3)
    else:
        scale1, shift1 = affine_map("norm_redundant", layer.norm_redundant)
        redundant = scaled(layer.weight_redundant, scale1)
    branch_bias = torch.stack((shift3, shift1))
    return gwc, pwc, redundant, branch_bias if layer.weight_gwc.dtype == torch.float64 else branch_bias.float()


def affine_map(name: str, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """s and t, [M], in float32 or better, of a norm that :func:`is_affine`.

    Raises:
        ValueError: one that is not; the message calls it ``name``.
    """
    if not is_affine(norm):
        state = "None" if norm is None else f"{norm} in {'training' if norm.training else 'eval'} mode"
        raise ValueError(
            f"{name} must be a BatchNorm2d or SyncBatchNorm without hooks, in eval mode and with running statistics, "
            f"to fold into the weights, got {state}"
        )
    assert isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = _precise(norm.running_mean), _precise(norm.running_var)
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = _precise(norm.weight) * scale
    return scale, -mean * scale if norm.bias is None else torch.addcmul(_precise(norm.bias), mean, scale, value=-1)


def norm_misfit(norm: nn.BatchNorm2d | nn.SyncBatchNorm, weight: Tensor, channels: int) -> str:
    """Why a norm does not fold into a convolution with such a weight and so many outputs; empty if it does."""
    if norm.training:
        return "is in training mode"
    if norm.running_mean is None:
        return "has no running statistics"
    if not is_affine(norm):
        return "has hooks" if has_hooks(norm) else f"is a {type(norm).__name__}, a subclass of a batch norm"
    if norm.running_mean.dtype != weight.dtype:
        return f"is in {norm.running_mean.dtype}, the convolution in {weight.dtype}"
    if norm.running_mean.device != weight.device:
        return f"is on {norm.running_mean.device}, the convolution on {weight.device}"
    if norm.num_features != channels:
        return f"has {norm.num_features} channels, not {channels}"
    return ""


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """The rows of [M, ...] times ``scale``, [M]."""
    return (_precise(weight) * scale[:, None, None, None]).to(weight.dtype)


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
