"""What a layer would run: backend, path, launches, tiles, bytes."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

from . import dispatch, functional, registration
from .autocast import cast
from .branch_norm import folds, normalises_batch
from .checks import check_input, shape
from .geometry import pair
from .kept import kept_bytes
from .layout import memory_format, padded_by_mode
from .modules import SPConv2d
from .native.convolution import channels_last
from .native.weights import prepare


@dataclass(frozen=True)
class Launch:
    """One kernel, or one ATen operation.

    Attributes:
        name: of the kernel or operation.
        tiles: the configurations that it may be launched with, and their grids; empty for ATen.
        bytes: of the tensors that it is given, each once.
    """

    name: str
    tiles: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Explanation:
    """What :func:`spconv_triton.explain` found; printed, it is a readable report.

    Attributes:
        layer, input: what was asked about.
        path: what runs, a row of :data:`spconv_triton.dispatch.PATHS`.
        launches: of one inference, in order.
        kept_bytes: what training keeps for the backward besides the parameters.
        input_bytes: of the input, to compare with.
    """

    layer: str
    input: str
    path: dispatch.Path
    launches: tuple[Launch, ...]
    kept_bytes: int
    input_bytes: int

    def __str__(self) -> str:
        lines = [
            f"{self.layer} on {self.input}",
            f"  backend {self.path.backend!r}, path {self.path.name!r}: {_reason(self.path)}",
            f"  {len(self.launches)} launches in inference",
        ]
        for launch in self.launches:
            lines.append(f"    {launch.name:<28} {launch.bytes / 1e6:9.3f} MB")
            lines += [f"        {tile}" for tile in launch.tiles]
        share = self.kept_bytes / self.input_bytes if self.input_bytes else 0.0
        lines.append(f"  kept for the backward: {self.kept_bytes / 1e6:.3f} MB, {share:.3f} x the input")
        return "\n".join(lines)


def explain(module: SPConv2d, x: Tensor, *, capability: tuple[int, int] | None = None) -> Explanation:
    """Find out which path serves ``x``, print it, and return it.

    On a GPU the layer is traced, not run. On a CPU a copy of it is run: three inferences, of which the last is
    recorded, and a forward with gradients. With ``capability`` it is traced as on a CUDA device of that compute
    capability, so that a machine without one can ask.

    Args:
        module: the layer.
        x: [N, L, H, W], an input of it, in a dtype that its backend has.
        capability: (major, minor), such as (9, 0); ints.

    Returns:
        What was printed, as data; bytes are those of tensors, not what caches save.

    Raises:
        TypeError: ``module`` is not an ``SPConv2d``, ``x`` is not a floating-point tensor, or ``capability`` no pair.
        ValueError: what calling the module would raise; or a ``capability`` where PyTorch is built without CUDA or
            triton does not import, so that nothing can be traced for a GPU.
    """
    if not isinstance(module, SPConv2d):
        raise TypeError(f"module must be an SPConv2d, got {type(module).__name__}")
    check_input("x", x)
    if capability is not None:
        if isinstance(capability, int):  # which elsewhere stands for a pair of them
            raise TypeError(f"capability must be a pair of ints such as (9, 0), got {capability!r}")
        capability = pair("capability", capability, 0)
    if capability is not None and (not torch.backends.cuda.is_built() or dispatch.why_no_triton()):
        missing = dispatch.why_no_triton() or "this PyTorch is built without CUDA"
        raise ValueError(
            f"capability must be None here, where nothing is traced for a GPU ({missing}), got {capability}"
        )
    traced = capability is not None or x.is_cuda
    with dispatch.assuming(capability) if capability is not None else nullcontext():
        found = _explain_traced(module, x) if traced else _explain_run(module, x)
    print(found)
    return found


def _describe(x: Tensor, device: str) -> str:
    layout = "channels_last" if memory_format(x) == torch.channels_last else "contiguous"
    return f"{shape(x)} {str(x.dtype).removeprefix('torch.')} {layout}, {device}"


def _reason(path: dispatch.Path) -> str:
    return f"taken on {path.device}; {path.dtypes}; layers: {path.layers}"


def _explain_traced(module: SPConv2d, x: Tensor) -> Explanation:
    """On fake CUDA tensors: nothing is allocated and nothing runs."""
    with FakeTensorMode(), torch.no_grad():

        def fake(tensor: Tensor) -> Tensor:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

        state = {name: fake(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
        value = fake(x)
        backend = dispatch.choose(value, module.backend)
        call = torch.func.functional_call
        graph = make_fx(lambda tensors, value: call(module, tensors, (value,)))(state, value)
        launches = tuple(_launches(graph))
        kept = _kept_by_operators(graph)
    names = {launch.name.rpartition("::")[2] for launch in launches}
    fitting = (p for p in dispatch.PATHS if p.backend == backend and (not p.kernel or p.kernel in names))
    path = next(p for p in fitting if p.device != "CPU")
    found = dispatch.capability(torch.device("cuda"))
    where = "cuda" if found is None else f"cuda, compute capability {found[0]}.{found[1]}"
    return Explanation(repr(module), _describe(x, where), path, launches, kept, x.numel() * x.itemsize)


SAVED: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    f"{registration.NAMESPACE}::spconv2d": ((0,), (1, 2, 3)),
    f"{registration.NAMESPACE}::spconv2d_batch_norm": ((0,), (1, 2, 3)),
    f"{registration.NAMESPACE}::representative_branch": ((0,), ()),
    f"{registration.NAMESPACE}::gap_softmax_fusion": ((0, 1), (1,)),
    "aten::convolution": ((0,), ()),
}
"""Which arguments and results of an operation autograd keeps, the weights apart."""


def _kept_by_operators(graph: torch.fx.GraphModule) -> int:
    """Bytes that the operations of a forward would keep for the backward, each storage counted once."""
    storages: dict[int, int] = {}
    for node in graph.graph.nodes:
        name = _operator_name(node)
        arguments, results = SAVED.get(name, ((0,), ()) if "batch_norm" in name else ((), ()))
        outputs = node.meta.get("val")
        for tensor in (*(_values(node)[i] for i in arguments), *(outputs[i] for i in results)):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _operator_name(node: torch.fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(node.target) if schema is None else schema.name


def _explain_run(module: SPConv2d, x: Tensor) -> Explanation:
    backend = dispatch.choose(x, module.backend)
    if backend == "triton":
        raise ValueError(
            "module must have another backend than 'triton' here: with TRITON_INTERPRET=1 its kernels are not traced"
        )
    with torch.inference_mode(False):  # in which copies could not be trained
        module = copy.deepcopy(module)  # running it in training mode moves the statistics of its norms
    if not module.branch_norm:
        module.eval()
    with torch.inference_mode():
        for _ in range(2):
            module(x)  # the first calls build what oneDNN and the layer keep
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as profiler:
            module(x)
    launches = tuple(
        Launch(event.name, (), sum(prod(s) for s in event.input_shapes if s) * x.itemsize)
        for event in profiler.events()
        if "::" in event.name and _is_outermost(event) and not _is_free(event.name)
    )
    with torch.inference_mode(False), torch.enable_grad():
        given = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        kept = kept_bytes(lambda: module(given), module.parameters())
    name = _native_path(module, x) if backend == "native" else backend
    path = next(p for p in dispatch.PATHS if p.backend == backend and p.name == name)
    return Explanation(repr(module), _describe(x, x.device.type), path, launches, kept, x.numel() * x.itemsize)


def _is_outermost(event: Any) -> bool:
    """Whether no operator called it; an autograd function, whose name has no namespace, is none."""
    parent = event.cpu_parent
    while parent is not None and "::" not in parent.name:
        parent = parent.cpu_parent
    return parent is None


def _native_path(module: SPConv2d, x: Tensor) -> str:
    """Which of the paths on ATen an inference takes, under the ``torch.autocast`` that there is."""
    if module.branch_norm and not folds(module):
        norms = (module.norm_representative, module.norm_redundant)
        computes = all(map(normalises_batch, norms)) and functional.takes_batch_norm(x, module.backend)
        return "batch norm" if computes else "given weights"
    geometry = module.geometry
    if module.padding_mode != "zeros":
        x = padded_by_mode(x, geometry.padding, module.padding_mode)
        geometry = geometry._replace(padding=(0, 0))
    x, gwc, pwc, redundant = cast(x, module.weight_gwc, module.weight_pwc, module.weight_redundant)
    return prepare(x, gwc, pwc, redundant, geometry).path(channels_last(x))


def _is_free(operation: str) -> bool:
    """Whether an ATen operation reads and writes no memory: a view, an allocation, or no tensor at all."""
    if operation.startswith(("aten::empty", "aten::new_empty", "aten::detach")):
        return True
    returns = [s.returns for s in torch._C._jit_get_schemas_for_operator(operation)]
    views = any(r.alias_info is not None and not r.alias_info.is_write for values in returns for r in values)
    tensors = any(isinstance(r.type, torch.TensorType) for values in returns for r in values)
    return bool(returns) and (views or not tensors)


def _nodes(graph: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    """The calls of a graph, operators of ours replaced by the calls of their bodies."""
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        body = registration.bodies.get(_operator_name(node))
        if body is None:
            yield node
        else:
            yield from _nodes(_trace(body, node))


def _trace(body: Callable[..., Any], node: torch.fx.Node) -> torch.fx.GraphModule:
    return make_fx(body)(*_values(node))


def _values(node: torch.fx.Node) -> list[Any]:
    """The arguments of a call, tensors as the fakes that stood for them."""
    return [a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in node.args]


def _launches(graph: torch.fx.GraphModule) -> Iterator[Launch]:
    for node in _nodes(graph):
        name = _operator_name(node)
        if name.startswith("triton_kernel_wrapper"):
            details: dict[str, Any] = dict(node.kwargs)
            kernel = kernel_side_table.get_kernel(details["kernel_idx"])
            yield Launch(_kernel_name(kernel), _tiles(kernel, details["grid"]), _bytes(details["kwargs"].values()))
        elif not _is_free(name):
            tensors = [a for a in node.args if isinstance(a, torch.fx.Node)]
            describe = registration.descriptions.get(name)
            tiles = () if describe is None else (describe(*_values(node)),)
            yield Launch(name, tiles, _bytes([*tensors, node]))


def _kernel_name(kernel: Any) -> str:
    while not hasattr(kernel, "__name__"):
        kernel = kernel.fn
    return kernel.__name__


def _tiles(kernel: Any, grids: list[Any]) -> tuple[str, ...]:
    """The configurations left after pruning; the tuner times them once per layer, not per size."""
    configs = getattr(kernel, "configs", [None] * len(grids))
    rows = []
    for config, grid in zip(configs, grids, strict=False):
        blocks = "" if config is None else ", ".join(f"{k}={v}" for k, v in config.kwargs.items())
        warps = "" if config is None else f", {config.num_warps} warps, {config.num_stages} stages"
        rows.append(f"{blocks}{warps}, grid {tuple(grid)}")
    return tuple(rows)


def _bytes(values: Any) -> int:
    tensors = {}
    for value in values:
        tensor = value.meta.get("val") if isinstance(value, torch.fx.Node) else None
        if isinstance(tensor, Tensor):
            tensors[value.name] = tensor.numel() * tensor.itemsize
    return sum(tensors.values())
