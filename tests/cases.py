"""Named shapes, fresh inputs and error budgets; the benchmarks reuse them.

Every budget is relative: an implementation may be wrong by twice what the same-dtype reference is wrong by, plus one
rounding of the result, both measured against float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from spconv_triton import functional, reference
from spconv_triton.geometry import Geometry
from spconv_triton.native.convolution import misses_weight_gradient, readable

GATE_CLAMP = 1e-24
"""An absolute error that is always allowed: gamma / beta is clamped at e^60, so a beta below 1e-26 looks like 1e-26."""

LUCK = 16.0
"""So many times its budget no draw may err, whatever the others do; the worst of 40 000 draws erred by 3 times."""


@dataclass(frozen=True)
class Case:
    """A layer and the input that it sees."""

    name: str
    batch: int
    in_channels: int
    out_channels: int
    size: tuple[int, int]
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 2
    alpha: float = 0.5

    def __str__(self) -> str:
        return self.name

    @property
    def representative(self) -> int:
        return int(self.in_channels * self.alpha)

    @property
    def window(self) -> dict[str, Any]:
        """The keyword arguments that every SPConv function takes."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    @property
    def geometry(self) -> Geometry:
        """The same as launch code takes it."""
        return Geometry(self.kernel_size, self.stride, self.padding, self.dilation, self.groups)

    def output_size(self) -> tuple[int, int]:
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(self.size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        )
        return height, width


# The 3 x 3 convolutions of ResNet-50's four stages: what the speed claims are made on.
RESNET50 = tuple(Case(f"resnet50-{c}@{s}", 8, c, c, (s, s)) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7)))

TRANSITIONS = tuple(
    Case(f"resnet50-{c}@{s}/2", 8, c, c, (s, s), stride=(2, 2)) for c, s in ((128, 56), (256, 28), (512, 14))
)
"""ResNet-50's 3 x 3 convolutions at a stride."""

# Small enough for the interpreter; each breaks one assumption that a kernel could make.
SMALL = (
    Case("plain", 2, 32, 32, (8, 8)),
    Case("odd-pixels", 3, 32, 48, (7, 5)),
    Case("odd-channels", 2, 26, 18, (6, 7), alpha=0.54),
    Case("narrow-groups", 2, 24, 24, (5, 6), groups=4, alpha=0.5),
    Case("one-group", 2, 20, 12, (5, 5), groups=1),
    Case("stride-2", 2, 32, 32, (8, 6), stride=(2, 2)),
    Case("stride-2-odd", 2, 32, 16, (7, 9), stride=(2, 2)),
    Case("stride-3-shifted", 1, 16, 16, (10, 8), stride=(3, 2), padding=(0, 2)),
    Case("dilated", 2, 16, 32, (9, 8), dilation=(2, 1), padding=(2, 1)),
    Case("no-padding", 2, 16, 16, (6, 5), padding=(0, 0)),
    Case("wide-padding", 1, 16, 16, (3, 4), padding=(3, 2)),
    Case("k5", 1, 16, 16, (6, 7), kernel_size=(5, 5), padding=(2, 2)),
    Case("k1x3", 1, 16, 16, (5, 6), kernel_size=(1, 3), padding=(0, 1)),
    Case("one-column", 3, 16, 16, (9, 1)),
    Case("one-pixel", 4, 16, 16, (1, 1)),
    Case("alpha-1/16", 2, 64, 32, (6, 6), alpha=1 / 16),
    Case("tiny", 1, 10, 6, (4, 3), alpha=0.6),
    Case("tiny-stride-2", 2, 6, 4, (3, 4), stride=(2, 2), alpha=0.67),
    Case("alpha-1", 2, 16, 16, (6, 5), alpha=1.0),
)


BY_NAME = {case.name: case for case in SMALL}

GATED = tuple(case for case in SMALL if case.alpha < 1)
"""Those with a redundant branch."""


@dataclass
class Inputs:
    """Leaf tensors of one call; ``None`` where the layer has none."""

    x: Tensor
    weight_gwc: Tensor
    weight_pwc: Tensor
    weight_redundant: Tensor | None
    bias: Tensor | None = None
    branch_bias: Tensor | None = None
    window: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Those that exist, by argument name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values as new leaves of ``dtype`` that require grad, strides kept."""
        moved = {name: value.detach().to(dtype).requires_grad_() for name, value in self.tensors().items()}
        return replace(self, **moved)

    def positional(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight_gwc, self.weight_pwc, self.weight_redundant, self.bias


def make_inputs(
    case: Case,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
    memory_format: torch.memory_format = torch.channels_last,
    mean: float = 0.0,
    gate: float = 0.0,
    bias: bool = True,
    branch_bias: bool = False,
) -> Inputs:
    """Random inputs from torch's own generator: unit-variance ``x`` around ``mean``, weights that keep the variance.

    Args:
        gate: shifts every S3 - S1 by about this much (through the branch biases), to saturate the gate.
    """
    aL, rest = case.representative, case.in_channels - case.representative
    like: dict[str, Any] = {"device": device, "dtype": torch.float32}

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, **like).div_((shape[1] * shape[2] * shape[3]) ** 0.5).to(dtype).requires_grad_()

    x = torch.randn(case.batch, case.in_channels, *case.size, **like).add_(mean)
    biases = 0.5 * torch.randn(2, case.out_channels, **like)
    biases[0] += gate
    return Inputs(
        x.to(dtype).contiguous(memory_format=memory_format).requires_grad_(),
        weight(case.out_channels, aL // case.groups, *case.kernel_size),
        weight(case.out_channels, aL, 1, 1),
        weight(case.out_channels, rest, 1, 1) if rest else None,
        torch.randn(case.out_channels, **like).to(dtype).requires_grad_() if bias else None,
        biases.to(dtype).requires_grad_() if branch_bias or gate else None,
        case.window,
    )


def run(
    function: Callable[..., Tensor], inputs: Inputs, grad: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """Output and gradients of ``function``, by name (``"y"`` and the argument names)."""
    y = function(*inputs.positional(), branch_bias=inputs.branch_bias, **inputs.window, **options)
    leaves = inputs.tensors()
    if grad is None:
        return {"y": y.detach()}
    grads = torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def native(*arguments: Tensor | None, **options: Any) -> Tensor:
    """``spconv2d`` on ATen."""
    return functional.spconv2d(*arguments, backend="native", **options)


def output_grad(inputs: Inputs) -> Tensor:
    """A random upstream gradient for ``spconv2d``, in the dtype of ``x`` and in channels_last."""
    shape = run(reference.spconv2d, inputs.to(torch.float64))["y"].shape
    return torch.randn(shape, device=inputs.x.device).to(inputs.x.dtype).contiguous(memory_format=torch.channels_last)


def assert_within_budget(
    name: str,
    got: Tensor,
    same_dtype: Tensor,
    exact: Tensor,
    *,
    factor: float = 2.0,
    condition: float = 1.0,
    sensitivity: float = 0.0,
) -> None:
    """``got`` is within ``factor`` x (error of the same-dtype reference + one rounding) of float64.

    Args:
        got: the result under test.
        same_dtype: the eager reference, computed in the dtype of ``got``.
        exact: the reference in float64.
        condition: how much the result amplifies one rounding of what it is computed from.
        sensitivity: the same measured, as an absolute error.
    """
    _assert_comparable(name, got, same_dtype, exact)
    if exact.numel() == 0:
        return
    error = (got.double() - exact).abs().max().item()
    reference_error = (same_dtype.double() - exact).abs().max().item()
    # Float64 has no better judge, so its reference error is 0: allow a sum's worth of roundings instead of one.
    roundings = 16 if got.dtype == torch.float64 else 1
    rounding = condition * roundings * torch.finfo(got.dtype).eps * exact.abs().max().item() + sensitivity
    allowed = factor * (reference_error + rounding) + GATE_CLAMP
    assert error <= allowed, (
        f"{name}: error {error:.3e} against float64, allowed {allowed:.3e} "
        f"(reference in {got.dtype}: {reference_error:.3e}, rounding: {rounding:.3e})"
    )


def _assert_comparable(name: str, got: Tensor, same_dtype: Tensor, exact: Tensor) -> None:
    assert got is not same_dtype, f"{name}: judged by itself"
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == same_dtype.dtype, f"{name}: dtype {got.dtype}, expected {same_dtype.dtype}"
    assert got.isfinite().all(), f"{name}: {int((~got.isfinite()).sum())} of {got.numel()} elements are not finite"


def assert_agrees(
    function: Callable[..., Tensor],
    inputs: Inputs,
    *,
    names: Iterable[str] | None = None,
    condition: float = 1.0,
    perturbations: int = 0,
    **options: Any,
) -> None:
    """Forward and every gradient of ``function`` are within budget of the reference in float64.

    Args:
        condition: how much a rounding of the statistics grows: |S3 - S1| where the gate is saturated, about |S3| / 4
            in Y and dx where x has a mean, since dY / dS3 = beta gamma (U3 - U1), and |S3| in the weights' gradients.
        perturbations: also allow what the exact result moves by when every element of the inputs moves by at most one
            rounding, the largest of so many random moves. For inputs that nobody chose: where a result is a small
            difference, the reference may be right by luck.
    """
    grad = output_grad(inputs)
    got, yardsticks, exact = _judge(function, inputs, grad, **options)
    moves = _sensitivity(inputs, grad, exact, perturbations)
    for name in names or exact:
        assert_within_budget(
            name, got[name], yardsticks[name], exact[name], condition=condition, sensitivity=moves[name]
        )


def assert_agrees_over_draws(
    function: Callable[..., Tensor], draw: Callable[[], Inputs], draws: int, *, perturbations: int = 0, **options: Any
) -> None:
    """As :func:`assert_agrees`, for the geometric mean of error / budget over the draws.

    Where the gate's gradient is a small difference of large sums, a draw's error is a matter of luck, the reference's
    as much as anyone's: about one draw in ten has a reference so lucky that no other order of summation comes within
    twice its error. Over many draws luck evens out, and what is left is how well the sums are taken. No single draw may
    be worse than luck explains: then it is not rounding.

    Args:
        perturbations: as of :func:`assert_agrees`: how ill-conditioned a draw is, measured instead of assumed.
    """
    judged, moves = [], []
    for inputs in (draw() for _ in range(draws)):
        grad = output_grad(inputs)
        judged.append(_judge(function, inputs, grad, **options))
        moves.append(_sensitivity(inputs, grad, judged[-1][2], perturbations))
    assert_within_budget_over_draws(judged, sensitivities=moves)


Results = dict[str, Tensor]


def assert_within_budget_over_draws(
    draws: Iterable[tuple[Results, Results, Results]],
    *,
    condition: float = 1.0,
    sensitivities: Iterable[dict[str, float]] | None = None,
) -> None:
    """As :func:`assert_within_budget`, for the geometric mean of error / allowed error over several draws.

    Args:
        draws: of each, by name: the results under test, those of the reference in the same dtype, and in float64.
        sensitivities: of each draw, by name: an absolute error that is allowed beside the rounding.
    """
    logarithms: dict[str, list[float]] = {}
    judged = list(draws)
    assert judged, "no draws"
    allowed = [{}] * len(judged) if sensitivities is None else sensitivities
    for (got, same_dtype, exact), moves in zip(judged, allowed, strict=True):
        for name, judge in exact.items():
            _assert_comparable(name, got[name], same_dtype[name], judge)
            roundings = 16 if got[name].dtype == torch.float64 else 1  # as of single draws
            rounding = condition * roundings * torch.finfo(got[name].dtype).eps * judge.abs().max().item()
            budget = 2 * (_largest_error(same_dtype[name], judge) + rounding + moves.get(name, 0.0)) + GATE_CLAMP
            ratio = _largest_error(got[name], judge) / budget
            logarithms.setdefault(name, []).append(math.log(max(ratio, 1e-3)))
    for name, values in logarithms.items():
        worst, ratio = math.exp(max(values)), math.exp(sum(values) / len(values))
        assert worst <= LUCK, f"{name}: {worst:.1f} x the allowed error in one of {len(values)} draws"
        assert ratio <= 1, f"{name}: {ratio:.2f} x the allowed error, as the geometric mean of {len(values)} draws"


def _judge(
    function: Callable[..., Tensor], inputs: Inputs, grad: Tensor, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Output and every gradient, for the upstream gradient ``grad``: of ``function``, of the reference in the dtype of
    ``inputs``, and of the reference in float64. ``function`` may write to none of its inputs."""
    before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in inputs.tensors().items()}
    got = run(function, inputs, grad, **options)
    for name, tensor in inputs.tensors().items():
        assert torch.equal(tensor.detach(), before[name][0]), f"{name} was written to"
        assert tensor._version == before[name][1], f"{name} was written to, and put back"
    exact = run(reference.spconv2d, inputs.to(torch.float64), grad)
    return got, yardsticks(references(inputs, grad), exact), exact


def yardsticks(same_dtype: list[Results], exact: Results) -> Results:
    """Of several runs of the reference in one dtype, by name, the result that errs most.

    ATen's convolutions err differently in the two layouts, by a factor of four in single draws: the yardstick is the
    layout that errs more, as in benchmarks the faster one is.
    """
    return {
        name: max((results[name] for results in same_dtype), key=lambda result: _largest_error(result, judge))
        for name, judge in exact.items()
    }


def _sensitivity(inputs: Inputs, grad: Tensor, exact: dict[str, Tensor], draws: int) -> dict[str, float]:
    """The largest change of each exact result over ``draws`` moves of all inputs by at most one rounding each."""
    largest = dict.fromkeys(exact, 0.0)

    def moved(tensor: Tensor) -> Tensor:
        eps = torch.finfo(tensor.dtype).eps
        return tensor.detach().double() * (1 + eps * (2 * torch.rand_like(tensor, dtype=torch.float64) - 1))

    for _ in range(draws):
        leaves = {name: moved(tensor).requires_grad_() for name, tensor in inputs.tensors().items()}
        for name, result in run(reference.spconv2d, replace(inputs, **leaves), moved(grad)).items():
            largest[name] = max(largest[name], _largest_error(result, exact[name]))
    return largest


def _largest_error(result: Tensor, judge: Tensor) -> float:
    return (result.double() - judge).abs().max().item() if judge.numel() else 0.0


def references(inputs: Inputs, grad: Tensor) -> list[dict[str, Tensor]]:
    """Output and gradients of the reference in the dtype of ``inputs``, in NCHW and, where sound, in channels_last."""
    window = [inputs.window[name] for name in ("stride", "padding", "dilation")]
    layouts, is_sound = [torch.contiguous_format], readable(inputs.x, inputs.weight_gwc, *window)[0] is inputs.x
    if not is_sound and inputs.x.itemsize == 2:
        # On processors with AMX oneDNN is wrong, or crashes, in NCHW too; ATen alone does not.
        with torch.backends.mkldnn.flags(enabled=False):
            return [_reference_in(torch.contiguous_format, inputs, grad)]
    if is_sound and not misses_weight_gradient(inputs.x, inputs.weight_gwc, inputs.window["dilation"]):
        layouts.append(torch.channels_last)
    return [_reference_in(layout, inputs, grad) for layout in layouts]


def _reference_in(layout: torch.memory_format, inputs: Inputs, grad: Tensor) -> dict[str, Tensor]:
    """The reference in the dtype of ``inputs``, on ``x``, the weights and ``grad`` in one memory format."""
    leaves = {
        name: tensor.detach().clone(memory_format=layout).requires_grad_()
        for name, tensor in inputs.tensors().items()
        if tensor.dim() == 4
    }
    return run(reference.spconv2d, replace(inputs, **leaves), grad.contiguous(memory_format=layout))


def kept_bytes(call: Callable[[], Tensor], beside: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of ``call``, each storage counted once, whole.

    The library has this too (:mod:`spconv_triton.kept`); benchmarks run this file beside older revisions of it.

    Args:
        beside: whose storages do not count, such as parameters.
    """
    others = {tensor.untyped_storage().data_ptr() for tensor in beside}
    storages: dict[int, torch.UntypedStorage] = {}  # held while they are counted, or an address could be used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    assert result.requires_grad
    return sum(storage.nbytes() for address, storage in storages.items() if address not in others)


def kept_beside_parameters(function: Callable[..., Tensor], inputs: Inputs) -> int:
    """Bytes that autograd keeps for the backward of ``function``, parameters aside."""
    parameters = [tensor for name, tensor in inputs.tensors().items() if name != "x"]
    return kept_bytes(lambda: function(*inputs.positional(), **inputs.window), parameters)
