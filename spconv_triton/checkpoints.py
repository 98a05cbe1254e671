"""Checkpoints of the layer as its authors published it (github.com/qiulinzhang/SPConv.pytorch), read into ours.

Their layer and ours compute the same, with other names, and with one parameter more on their side:

    gwc.weight      weight_gwc                conv1x1.weight    weight_redundant
    pwc.weight      weight_pwc                conv1x1.bias      subtracted from norm_redundant.running_mean
    bn1.*           norm_representative.*     bn2.*             norm_redundant.*

The first int(L alpha) channels are the representative ones in both; the pooling at stride 2 has no parameters.

conv1x1.bias, c, is added to U1 in front of the norm bn2, which removes it. In training bn2 subtracts the mean of the
batch, and c with it. In eval it subtracts its running mean r, so U1 + c - r = U1 - (r - c): ours has r - c for a
running mean. That stays so in further training, for the running mean of U1 + c moves towards mean(U1) + c by the same
share by which that of U1 moves towards mean(U1).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .arguments import check_module
from .checks import shape
from .modules import SPConv2d

__all__ = ["IncompatibleKeys", "load_reference_checkpoint"]

WRAPPERS = ("module.", "_orig_mod.", "1.")
"""What stands before every name, put there by (Distributed)DataParallel, by torch.compile, or by apex where it halves a
network."""

RENAMED = {
    "gwc.weight": "weight_gwc",
    "pwc.weight": "weight_pwc",
    "conv1x1.weight": "weight_redundant",
    **{
        f"{theirs}.{name}": f"{ours}.{name}"
        for theirs, ours in (("bn1", "norm_representative"), ("bn2", "norm_redundant"))
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    },
}
"""Names within a layer, theirs to ours."""


class IncompatibleKeys(NamedTuple):
    """What did not fit, as of ``nn.Module.load_state_dict``.

    Attributes:
        missing_keys: names of the model that the checkpoint has no value for.
        unexpected_keys: names of the checkpoint that the model has no place for.
        mismatched_keys: names of the checkpoint whose shapes are not the model's.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatched_keys: list[str]


def load_reference_checkpoint(
    model: nn.Module, checkpoint: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = True
) -> IncompatibleKeys:
    """Load a checkpoint of the reference implementation into a model whose SPConv layers are ``SPConv2d``.

    Around the layers the names must be the model's own, as those of :mod:`spconv_triton.models` are the reference
    implementation's. Old checkpoints may lack ``num_batches_tracked``, and layers without ``conv1x1.bias`` load too.

    Args:
        model: its SPConv layers have ``branch_norm=True`` and ``bias=False``, and the alpha of the checkpoint.
        checkpoint: a file, read with ``weights_only=True``, or what was read from one: a state dict, or a dict that
            holds one as ``"state_dict"``. Its names may all have one of :data:`.checkpoints.WRAPPERS` before them.
        strict: False loads what fits, layer by layer and parameter by parameter.

    Returns:
        What did not fit; three empty lists if ``strict``.

    Raises:
        TypeError: a ``model`` or ``checkpoint`` that is neither.
        OSError: there is no such file, or it may not be read.
        ValueError: a file that cannot be read with ``weights_only=True``, or holds no state dict; a tensor
            that is sparse, quantized, complex or without values; or, if ``strict``, names or shapes that do not fit,
            all of them in one message. The model is then as it was.
    """
    check_module(model)
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    wrapper = _wrapper(state)
    wanted = {name.removeprefix(wrapper): value for name, value in state.items()}
    layers = [
        f"{path}.".removeprefix(".").removeprefix(wrapper)
        for path, module in model.named_modules()
        if isinstance(module, SPConv2d)
    ]
    found = _state_dict(checkpoint)
    found_wrapper = _wrapper(found, unless=wanted)
    found = {name.removeprefix(found_wrapper): value for name, value in found.items()}

    values, unexpected = _translate(layers, found, wanted)
    for name, value in values.items():
        unfit = _misfit(value.tensor, wanted[name])
        if unfit:
            raise ValueError(
                f"checkpoint must have tensors that can be copied into parameters, got {value.source}, {unfit}"
            )
    mismatched = [name for name, value in values.items() if value.tensor.shape != wanted[name].shape]
    missing = [name for name in wanted if name not in values and not name.endswith("num_batches_tracked")]
    result = IncompatibleKeys(
        [wrapper + name for name in missing],
        [found_wrapper + name for name in unexpected],
        [found_wrapper + values[name].source for name in mismatched],
    )
    if strict and any(result):
        lines = [
            f"checkpoint must have the parameters of this {type(model).__name__}, got",
            *(f"  no {name}, {shape(wanted[name])}" for name in missing),
            *(f"  {name}, which it has no place for" for name in unexpected),
            *(
                f"  {values[name].source} as {shape(values[name].tensor)} instead of {shape(wanted[name])}"
                for name in mismatched
            ),
        ]
        raise ValueError("\n".join(lines))
    fitting = {wrapper + name: value.tensor for name, value in values.items() if name not in mismatched}
    model.load_state_dict(fitting, strict=False)
    return result


class Value(NamedTuple):
    """A tensor of a checkpoint, and its name there."""

    source: str
    tensor: Tensor


def _translate(
    layers: Iterable[str], found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Value], list[str]]:
    """The checkpoint's tensors by the model's names, and the names that the model has no place for.

    Args:
        layers: what stands before the names of each layer's parameters.
        found, wanted: the checkpoint's tensors and the model's, without wrappers.
    """
    ours = {layer + theirs: layer + name for layer in layers for theirs, name in RENAMED.items()}
    values: dict[str, Value] = {}
    for source, tensor in found.items():
        name = ours.get(source, source)
        if name in wanted and name not in values:
            values[name] = Value(source, tensor)
    used = {value.source for value in values.values()}
    for layer in layers:
        source, name = f"{layer}conv1x1.bias", f"{layer}norm_redundant.running_mean"
        if source in found and name in values and found[source].shape == values[name].tensor.shape:
            mean = values[name].tensor.double() - found[source].double()
            values[name] = Value(values[name].source, mean)
            used.add(source)
    return values, [source for source in found if source not in used]


def _state_dict(checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Tensor]:
    if isinstance(checkpoint, (str, os.PathLike)):
        with open(checkpoint, "rb") as file:
            try:
                loaded = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # what a damaged file raises is not specified, and may be an OSError
                raise ValueError(
                    f"checkpoint must be readable with weights_only=True, got {os.fspath(checkpoint)!r}: "
                    f"{str(error) or type(error).__name__}"
                ) from error
    else:
        loaded = checkpoint
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        refused = TypeError if loaded is checkpoint else ValueError
        raise refused(f"checkpoint must be a path or a mapping of names to tensors, got {type(loaded).__name__}")
    others = {
        name: value for name, value in loaded.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    }
    if others:
        what = ", ".join(f"{name} ({type(value).__name__})" for name, value in others.items())
        raise ValueError(f"checkpoint must be a mapping of names to tensors, got {what}")
    return loaded


def _misfit(tensor: Tensor, wanted: Tensor) -> str:
    """What keeps ``tensor`` from being copied into ``wanted`` as it is, beside its shape; empty if nothing does."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return "which is nested" if tensor.is_nested else f"of layout {tensor.layout}"
    if tensor.is_complex() or tensor.is_quantized:
        return f"of {tensor.dtype}"
    return "on the meta device, where there are no values" if tensor.is_meta and not wanted.is_meta else ""


def _wrapper(names: Iterable[str], unless: Iterable[str] = ()) -> str:
    """The wrappers' names that stand before all ``names``; not those with which a name in ``unless`` begins."""
    names, found = list(names), ""
    candidates = [w for w in WRAPPERS if not any(name.startswith(w) for name in unless)]
    while names and (wrapper := next((w for w in candidates if all(n.startswith(found + w) for n in names)), None)):
        found += wrapper
    return found
