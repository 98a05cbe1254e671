"""SPConv2d, the layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .arguments import check_flag, check_one_of
from .branch_norm import fold_branch_norms, folds, normalises_batch, track
from .channels import DEFAULT_ALPHA, DEFAULT_GROUPS, count_representative
from .checks import FLOATING, check_input, check_padding, shape
from .dispatch import BACKENDS
from .folded_norms import FoldedNorms
from .geometry import Geometry, IntPair, as_pair, pair, resolve
from .layout import memory_format, padded_by_mode
from .native.inference import Inference
from .symbols import call_of, is_symbol

TENSORS = dict.fromkeys(("weight_gwc", "weight_pwc", "weight_redundant", "bias")).keys()
"""The parameters of a layer besides those of its norms: a view of keys, which has an order and compares as a set."""

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class SPConv2d(nn.Module):
    """A k x k convolution that spends the k x k kernel on a representative part of its input channels.

    Stands where ``torch.nn.Conv2d(in_channels, out_channels, kernel_size, ...)`` stood. The first alpha L channels go
    through a group-wise k x k and a 1 x 1 convolution, the rest through a 1 x 1 convolution, and a gate without
    parameters mixes the two: 3.25 L M weights against 9 L M at the defaults.

    Args:
        in_channels: L, of the input.
        out_channels: M, of the output; divisible by ``groups``.
        kernel_size: odd, an int or (vertical, horizontal).
        stride, padding, dilation: pixels; padding also ``"same"`` and ``"valid"``.
        groups: G of the group-wise convolution.
        bias: adds a learnable [M] after the gate.
        padding_mode: as of ``nn.Conv2d``; other than ``"zeros"`` the input is padded first, so that the 1 x 1
            convolutions see the padded input too.
        device, dtype: of the parameters.
        alpha: share of representative channels, in (0, 1]; ``int(in_channels * alpha)`` of them, a positive multiple of
            ``groups``. At alpha = 1 there is no redundant part and no gate: Y = U3.
        branch_norm: puts a BatchNorm2d on U3 and on U1 before the gate, as the reference implementation does. Other
            norms may take their place. Batch norms in eval mode are folded into the weights.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``; see :mod:`spconv_triton.functional`.

    Shape:
        [N, in_channels, H, W] -> [N, out_channels, H_out, W_out], H_out and W_out as of ``nn.Conv2d``; float32,
        bfloat16, float16 or float64, that of the parameters unless ``torch.autocast`` says otherwise. The output keeps
        the memory format of the input; channels_last is the fast one.

    Concurrency:
        Threads may share a layer in eval, and train it with gradients of their own. (Batch norms in training mode track
        statistics, as PyTorch's do.) Kernels run on the current CUDA stream of the
        calling thread: whoever computes on another stream waits for the tensors' own first, as for any operation.

    Prepared weights:
        In eval, without gradients, on a CPU, a layer keeps its weights in oneDNN's order too, and folded with the norms
        of its branches, until they change or the layer trains. In-place operations, optimizers, ``load_state_dict``
        and ``.to()`` are changes. So is what is written through ``.data``, but for single values of a weight of more
        than 512: only a sample of those is compared (:mod:`spconv_triton.watch`).

    Not finite:
        A mean S3 or S1 that is NaN or infinite makes its plane of the output (one sample, one channel) NaN, as the
        softmax does. If the mean is -inf, ATen makes only the infinite pixels NaN, and the Triton kernels the whole
        plane. The kernels differ in two more cases: a value that is not finite makes its sample NaN even where no
        output reads it (at an edge without padding, or between strides), and where the gate is closed to U3
        (S1 - S3 > 60) a U1 beyond 3e12 becomes infinite.

    Memory format of the weights:
        ``weight_gwc`` is channels_last from the start. What makes one vector of parameters (``torch.optim.LBFGS``,
        ``parameters_to_vector``, unstructured pruning), FSDP2, safetensors' ``save_file`` and
        ``nn.init.orthogonal_`` want ``.to(memory_format=torch.contiguous_format)``.

    Attributes:
        weight_gwc: [M, alpha L / G, k, k].
        weight_pwc: [M, alpha L, 1, 1].
        weight_redundant: [M, L - alpha L, 1, 1]; None at alpha = 1.
        bias: [M] or None.
        norm_representative, norm_redundant: of U3 and of U1, with ``branch_norm``; else None.
        representative_channels, redundant_channels: alpha L and L - alpha L.

    Raises:
        TypeError, ValueError: an argument that cannot be honoured; the message names it, its value and what is legal.

    Source: Zhang et al., "Split to Be Slim", IJCAI 2020, section 3.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    alpha: float
    representative_channels: int
    redundant_channels: int
    weight_gwc: Tensor
    weight_pwc: Tensor
    weight_redundant: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair | str = 0,
        dilation: IntPair = 1,
        groups: int = DEFAULT_GROUPS,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float = DEFAULT_ALPHA,
        branch_norm: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        geometry = resolve(kernel_size, stride, padding, dilation, groups)
        representative = count_representative(in_channels, out_channels, groups, alpha)
        # nn.Conv2d takes 0 and NumPy's booleans too; of an array it cannot be asked.
        if getattr(bias, "shape", ()) or bias not in (True, False):
            raise TypeError(f"bias must be True or False, got {bias!r}")
        check_flag("branch_norm", branch_norm)
        check_one_of("padding_mode", padding_mode, PADDING_MODES)
        check_one_of("backend", backend, BACKENDS)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = geometry.kernel_size
        self.stride = geometry.stride
        self.padding = padding if isinstance(padding, str) else geometry.padding
        self.dilation = pair("dilation", dilation, 1)
        self.groups = groups
        self.padding_mode = padding_mode
        self.alpha = alpha
        self.backend = backend
        self.representative_channels = representative
        self.redundant_channels = in_channels - representative
        self._inference = Inference()
        self._folded_norms = FoldedNorms()

        if dtype is not None and dtype not in FLOATING:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        # channels_last in memory: the kernels read it as it is stored.
        gwc = torch.empty(out_channels, representative // groups, *self.kernel_size, **like)
        self.weight_gwc = nn.Parameter(gwc.contiguous(memory_format=torch.channels_last))
        self.weight_pwc = nn.Parameter(torch.empty(out_channels, representative, 1, 1, **like))
        if self.redundant_channels:
            self.weight_redundant = nn.Parameter(torch.empty(out_channels, self.redundant_channels, 1, 1, **like))
        else:
            self.register_parameter("weight_redundant", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, **like))
        else:
            self.register_parameter("bias", None)
        self.norm_representative: nn.Module | None = nn.BatchNorm2d(out_channels, **like) if branch_norm else None
        self.norm_redundant: nn.Module | None = (
            nn.BatchNorm2d(out_channels, **like) if branch_norm and self.redundant_channels else None
        )
        self.reset_parameters()

    @property
    def branch_norm(self) -> bool:
        """Whether norms stand in the branches, before the gate."""
        return self.norm_representative is not None or self.norm_redundant is not None

    def reset_parameters(self) -> None:
        """Initialise so that the output variance is that of a fresh ``nn.Conv2d``: var(x) / 3.

        An output sees F = k^2 alpha L / G + L / s^2 weights' worth of input variance (pooling s x s pixels divides the
        variance of white input by s^2), and the gate starts at beta = gamma = 1/2, which quarters it. With weights
        U(-b, b), var(Y) = F b^2 / 3 / 4 var(x), so b = 2 / sqrt(F); at alpha = 1 there is no gate, and b = 1 / sqrt(F).
        With branch norms the scale of the weights does not matter. The bias is ``nn.Conv2d``'s.
        """
        geometry = self.geometry
        grouped = geometry.taps * self.representative_channels / self.groups
        pooled = self.in_channels / (geometry.stride[0] * geometry.stride[1])
        gate = 0.5 if self.redundant_channels else 1.0
        bound = 1 / (gate * math.sqrt(grouped + pooled))
        for weight in (self.weight_gwc, self.weight_pwc, self.weight_redundant):
            if weight is not None:
                nn.init.uniform_(weight, -bound, bound)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_channels * geometry.taps)
            nn.init.uniform_(self.bias, -bound, bound)
        for norm in (self.norm_representative, self.norm_redundant):
            reset = getattr(norm, "reset_parameters", None)  # of a batch norm, or of what the user put in its place
            if reset is not None:
                reset()

    @property
    def geometry(self) -> Geometry:
        """Where the taps fall, padding words resolved."""
        return resolve(self.kernel_size, self.stride, self.padding, self.dilation, self.groups)

    @property
    def _window_padding(self) -> tuple[int, int]:
        """In pixels; attributes may have been assigned, as those of ``nn.Conv2d`` may."""
        padding = self.padding
        return padding if type(padding) is tuple and len(padding) == 2 else self.geometry.padding

    @property
    def taps(self) -> int:
        """k^2, the taps of the window."""
        return self.kernel_size[0] * self.kernel_size[1]

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        alpha: float = DEFAULT_ALPHA,
        groups: int = DEFAULT_GROUPS,
        *,
        branch_norm: bool = False,
        backend: str = "auto",
    ) -> SPConv2d:
        """A freshly initialised layer with the geometry, device, dtype, memory format and mode of ``conv``.

        The weights are new (no SPConv computes what a dense k x k does); the bias, which plays the same part in both,
        is copied.

        Args:
            conv: itself an ``nn.Conv2d``, of one group; it stays as it is.
            alpha, groups, branch_norm, backend: as of the constructor.

        Returns:
            The layer, with what is settled above.

        Raises:
            TypeError: ``conv`` is not an ``nn.Conv2d``, or of a class derived from it.
            ValueError: ``conv`` is itself grouped, or SPConv2d cannot have its shape at this alpha and groups.
        """
        if type(conv) is not nn.Conv2d:
            raise TypeError(
                "conv must be a torch.nn.Conv2d itself (a subclass may compute something else), "
                f"got {type(conv).__name__}"
            )
        if conv.groups != 1:
            raise ValueError(f"conv must have groups=1 (a grouped convolution is slim already), got {conv.groups}")
        kernel_size, stride, dilation = map(as_pair, (conv.kernel_size, conv.stride, conv.dilation))
        layer = cls(
            int(conv.in_channels),
            int(conv.out_channels),
            kernel_size,
            stride,
            conv.padding if isinstance(conv.padding, str) else as_pair(conv.padding),
            dilation,
            groups,
            conv.bias is not None,
            conv.padding_mode,
            conv.weight.device,
            conv.weight.dtype,
            alpha=alpha,
            branch_norm=branch_norm,
            backend=backend,
        )
        if layer.bias is not None and conv.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(conv.bias)
        layer.to(memory_format=memory_format(conv.weight))
        return layer.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        """Y = beta U3 + gamma U1 + bias: [N, L, H, W] -> [N, M, H_out, W_out].

        Args:
            input: called what ``nn.Conv2d`` calls it; in a dtype that the backend has, that of the parameters unless
                ``torch.autocast`` says otherwise.

        Returns:
            Y, in the dtype and memory format of ``input``.

        Raises:
            TypeError, ValueError: an input that does not fit, as of :func:`spconv_triton.functional.spconv2d`, whose
                ``x`` it is.
        """
        if is_symbol(input):
            return call_of(self, input)
        x = input
        padding = self._window_padding
        if self.padding_mode != "zeros":
            check_input("x", x)
            check_padding(x, padding, self.padding_mode)
            x = padded_by_mode(x, padding, self.padding_mode)
            padding = (0, 0)
        inference = branch_bias = None
        parameters: dict[str, Any] = self._parameters
        compiling = torch.compiler.is_compiling()
        are_parameters = not compiling and parameters.keys() >= TENSORS  # else they may be new in every call
        if are_parameters:
            gwc, pwc, redundant, bias = map(parameters.__getitem__, TENSORS)  # as attributes they are searched for
        else:
            gwc, pwc, redundant, bias = self.weight_gwc, self.weight_pwc, self.weight_redundant, self.bias
        if not compiling:
            if self.training:
                self._inference.forget()
                self._folded_norms.forget()
            elif not self.branch_norm:
                # A new one prepares weights the same way for this call, so that pruned ones give the same bits.
                inference = self._inference if are_parameters else Inference()
        if self.branch_norm:
            if not folds(self):
                parts = {"stride": self.stride, "padding": padding, "dilation": self.dilation}
                return self._forward_branch_norm(x, parts)
            if are_parameters and not self.training:
                (gwc, pwc, redundant, branch_bias), remembered = self._folded_norms.fold(self)
                inference = self._inference if remembered else None
            else:
                gwc, pwc, redundant, branch_bias = fold_branch_norms(self)
        window = (self.stride, padding, self.dilation, self.groups)
        return functional.layer_forward((x, gwc, pwc, redundant, bias, branch_bias), window, self.backend, inference)

    def _forward_branch_norm(self, x: Tensor, window: dict[str, Any]) -> Tensor:
        """The layer with norms that do not fold: in one pass where the kernels, or ATen on a CPU, compute the norms
        (:func:`.functional.takes_batch_norm`), else part by part.

        They take what :func:`.branch_norm.normalises_batch` describes, in both branches, and a batch that is not
        empty; whatever module else stands in a branch is called.
        """
        check_input("x", x)
        if x.shape[1] != self.in_channels:
            raise ValueError(f"x must have {self.in_channels} channels, got {x.shape[1]}: {shape(x)}")
        norms = (self.norm_representative, self.norm_redundant)
        if all(map(normalises_batch, norms)) and x.shape[0] > 0 and functional.takes_batch_norm(x, self.backend):
            return self._forward_batch_norm(x, window)
        x3, x1 = x.split((self.representative_channels, self.redundant_channels), dim=1)
        y = functional.representative_branch(
            x3, self.weight_gwc, self.weight_pwc, groups=self.groups, backend=self.backend, **window
        )
        if self.norm_representative is not None:
            y = self.norm_representative(y)
        if self.weight_redundant is not None:
            u1 = functional.redundant_branch(x1, self.weight_redundant, kernel_size=self.kernel_size, **window)
            if self.norm_redundant is not None:
                u1 = self.norm_redundant(u1)
            y = functional.gap_softmax_fusion(y, u1, backend=self.backend)
        return y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)

    def _forward_batch_norm(self, x: Tensor, window: dict[str, Any]) -> Tensor:
        norm3, norm1 = self.norm_representative, self.norm_redundant
        assert isinstance(norm3, (nn.BatchNorm2d, nn.SyncBatchNorm))
        assert isinstance(norm1, (nn.BatchNorm2d, nn.SyncBatchNorm))
        assert self.weight_redundant is not None
        y, mean, variance = functional.spconv2d_batch_norm(
            x,
            self.weight_gwc,
            self.weight_pwc,
            self.weight_redundant,
            self.bias,
            norm_representative=(norm3.weight, norm3.bias),
            norm_redundant=(norm1.weight, norm1.bias),
            eps=(norm3.eps, norm1.eps),
            groups=self.groups,
            backend=self.backend,
            **window,
        )
        values = y.shape[0] * y.shape[2] * y.shape[3]
        track(norm3, mean[0], variance[0], values)
        track(norm1, mean[1], variance[1], values)
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> SPConv2d:
        """Of ``.to()`` and its like, behind which nothing would ask for what was prepared, or free its memory."""
        self._inference.forget()
        self._folded_norms.forget()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return layer_repr(self, bias=self.bias is not None, branch_norm=self.branch_norm)


def layer_repr(layer: Any, *, bias: bool = True, **options: Any) -> str:
    """The arguments of a layer, fused or not, in a ``repr``: those that are not at their defaults.

    Args:
        bias: whether it has one, where that is told.
        options: what it is besides, by name; told unless False or ``"none"``.
    """
    parts = [f"{layer.in_channels}, {layer.out_channels}, kernel_size={layer.kernel_size}, stride={layer.stride}"]
    if layer.padding not in ((0, 0), "valid"):
        parts.append(f"padding={layer.padding!r}")
    if layer.dilation != (1, 1):
        parts.append(f"dilation={layer.dilation}")
    parts.append(f"groups={layer.groups}, alpha={layer.alpha}")
    if not bias:
        parts.append("bias=False")
    if layer.padding_mode != "zeros":
        parts.append(f"padding_mode={layer.padding_mode!r}")
    parts += [f"{name}={value!r}" for name, value in options.items() if value not in (False, "none")]
    if layer.backend != "auto":
        parts.append(f"backend={layer.backend!r}")
    return ", ".join(parts)
