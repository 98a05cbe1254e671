"""Every operator without data: the shapes of its results and the multiply-adds that FlopCounterMode counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case
from small_network import images, small_network
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spconv_triton import summary
from spconv_triton.dispatch import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("the operators need triton", allow_module_level=True)

OPERATORS = torch.ops.spconv_triton
CASES = (
    Case("stride-1", 3, 128, 192, (10, 12), groups=2),
    Case("stride-2", 2, 96, 64, (9, 7), stride=(2, 2), groups=4, alpha=1 / 3),
    Case("k5", 2, 12, 8, (9, 7), kernel_size=(5, 3), padding=(2, 0), dilation=(1, 2), groups=1, alpha=0.75),
)


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def flops(call: Callable[[], Any]) -> tuple[Any, int]:
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_total_flops()


class Layer:
    """The tensors of a case, and what the paper's equations cost: two per multiply-add."""

    def __init__(self, case: Case) -> None:
        self.case = case
        channels, outputs, representative = case.in_channels, case.out_channels, case.representative
        self.output = (case.batch, outputs, *case.output_size())
        self.x = meta(case.batch, channels, *case.size)
        self.gwc = meta(outputs, representative // case.groups, *case.kernel_size)
        self.pwc = meta(outputs, representative, 1, 1)
        self.redundant = meta(outputs, channels - representative, 1, 1)
        self.bias = meta(outputs)
        self.branch_bias = meta(2, outputs, dtype=torch.float32)
        self.window = (list(case.stride), list(case.padding), list(case.dilation), case.groups)
        per_weight = 2 * case.batch * case.output_size()[0] * case.output_size()[1]
        self.branch_flops = per_weight * (self.gwc.numel() + self.pwc.numel())
        self.flops = self.branch_flops + per_weight * self.redundant.numel()

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gwc, self.pwc, self.redundant


def shapes(tensors: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


every_case = pytest.mark.parametrize("layer", [Layer(case) for case in CASES], ids=lambda layer: layer.case.name)


@every_case
def test_spconv2d(layer: Layer) -> None:
    tensors = (layer.x, *layer.weights)
    (y, *kept), forward = flops(lambda: OPERATORS.spconv2d(*tensors, layer.bias, layer.branch_bias, *layer.window))
    assert y.shape == layer.output
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert forward == layer.flops
    gradients, backward = flops(
        lambda: OPERATORS.spconv2d_backward(y, *tensors, layer.branch_bias, *kept, *layer.window)
    )
    assert shapes(gradients) == shapes((*tensors, layer.branch_bias))
    assert backward == 2 * layer.flops


@every_case
def test_spconv2d_inference(layer: Layer) -> None:
    y, total = flops(
        lambda: OPERATORS.spconv2d_inference(
            layer.x, *layer.weights, layer.bias, None, layer.bias, meta(*layer.output), "relu", *layer.window
        )
    )
    assert y.shape == layer.output
    assert total == layer.flops


@every_case
def test_spconv2d_batch_norm(layer: Layer) -> None:
    tensors, norms = (layer.x, *layer.weights), (layer.bias,) * 4
    (y, *kept), forward = flops(
        lambda: OPERATORS.spconv2d_batch_norm(*tensors, layer.bias, *norms, 1e-5, 1e-5, *layer.window)
    )
    assert y.shape == layer.output
    assert forward == layer.flops
    gradients, backward = flops(
        lambda: OPERATORS.spconv2d_batch_norm_backward(y, *tensors, *norms, *kept, *layer.window)
    )
    assert shapes(gradients) == [*shapes(tensors), (5, layer.case.out_channels)]
    assert backward == 2 * layer.flops


@every_case
def test_representative_branch(layer: Layer) -> None:
    tensors = (layer.x[:, : layer.case.representative], layer.gwc, layer.pwc)
    u3, forward = flops(lambda: OPERATORS.representative_branch(*tensors, *layer.window))
    assert u3.shape == layer.output
    assert forward == layer.branch_flops
    gradients, backward = flops(lambda: OPERATORS.representative_branch_backward(u3, *tensors, *layer.window))
    assert shapes(gradients) == shapes(tensors)
    assert backward == 2 * layer.branch_flops


def test_gap_softmax_fusion_multiplies_no_matrices() -> None:
    u = meta(2, 5, 4, 3)
    (y, gate), forward = flops(lambda: OPERATORS.gap_softmax_fusion(u, u))
    gradients, backward = flops(lambda: OPERATORS.gap_softmax_fusion_backward(y, u, u, gate))
    assert shapes((y, gate, *gradients)) == [(2, 5, 4, 3), (2, 5), (2, 5, 4, 3), (2, 5, 4, 3)]
    traced, forward_of_traced = flops(lambda: OPERATORS.native_gap_softmax_fusion(u, u))
    assert shapes((traced,)) == [(2, 5, 4, 3)]
    assert forward == backward == forward_of_traced == 0


@pytest.mark.parametrize("stride", [1, 2])
def test_onepass_descriptor(stride: int) -> None:
    """What a compiled layer keeps of the forward, being opaque: all of its multiply-adds."""
    layer = Layer(Case("", 3, 128, 192, (10, 12), stride=(stride, stride)))
    planes = (meta(3, 192, dtype=torch.float32),) * 3
    # What the matrix of packed weights has as columns is padding, too, and no matter.
    arguments = (layer.x, meta(192, 1000), *planes, None, layer.case.representative, 2, stride, "none")
    y, total = flops(lambda: OPERATORS.onepass_descriptor(*arguments))
    assert y.shape == layer.output
    assert total == layer.flops


@pytest.mark.parametrize("stride", [1, 2])
def test_gradient_descriptors(stride: int) -> None:
    """What a compiled layer keeps of the backward: either has as many as the forward."""
    layer = Layer(Case("", 3, 128, 192, (10, 12), stride=(stride, stride)))
    pooled = None if stride == 1 else meta(3, 128, 5, 6)
    batch, outputs = layer.output[:2]
    y, ratio = meta(*layer.output), meta(batch, outputs, dtype=torch.float32)
    _, by_weights = flops(
        lambda: OPERATORS.weight_grad_descriptor(y, layer.x, pooled, *layer.weights, ratio, 2, stride)
    )
    constant = meta(9, batch, 128, dtype=torch.float32)
    gate = torch.stack((ratio, ratio))
    dx, by_x = flops(lambda: OPERATORS.input_grad_descriptor(y, meta(1000, 128), gate, constant, 64, 2, stride))
    assert dx.shape == layer.x.shape
    assert by_weights == by_x == layer.flops


def test_every_operator_is_counted_here() -> None:
    registered = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if "spconv_triton" in n}
    pairs = {"spconv2d", "spconv2d_batch_norm", "representative_branch", "gap_softmax_fusion"}
    opaque = {"onepass_descriptor", "weight_grad_descriptor", "input_grad_descriptor"}
    others = {"spconv2d_inference", "native_gap_softmax_fusion"}
    assert registered == pairs | {f"{name}_backward" for name in pairs} | opaque | others


@torch.no_grad()
def test_a_converted_network_costs_what_its_summary_says() -> None:
    """On ATen, where there is no operator of ours; on meta tensors and with data."""
    network = small_network().eval()
    x = images(2, (12, 10))
    _, total = flops(lambda: network(x))
    _, without_data = flops(lambda: network.to("meta")(x.to("meta")))
    assert total == without_data > 0
    assert total == 2 * summary(small_network(), tuple(x.shape)).total.macs_after
