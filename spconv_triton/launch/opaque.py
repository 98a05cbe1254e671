"""The launches whose arguments are host descriptors: traced, they would vanish from the graph, so they are operators.

They are registered without being loaded, and a caller in this package calls them by these names.
"""

from ..registration import OpaqueOp

_DESCRIPTOR = f"{__package__}.descriptor"
_GRADIENTS = f"{__package__}.gradients_descriptor"

convolve = OpaqueOp(
    "onepass_descriptor",
    "(Tensor x, Tensor packed, Tensor ratio, Tensor scale, Tensor offset, Tensor? residual, SymInt representative, "
    "SymInt groups, SymInt stride, str activation) -> Tensor",
    f"{_DESCRIPTOR}:convolve",
    f"{_DESCRIPTOR}:empty_convolved",
    f"{_DESCRIPTOR}:describe",
)
weight_grad = OpaqueOp(
    "weight_grad_descriptor",
    "(Tensor grad, Tensor x, Tensor? pooled, Tensor weight_gwc, Tensor weight_pwc, Tensor weight_redundant, "
    "Tensor ratio, SymInt groups, SymInt stride) -> (Tensor, Tensor)",
    f"{_GRADIENTS}:weight_grad",
    f"{_GRADIENTS}:empty_weight_grad",
)
input_grad = OpaqueOp(
    "input_grad_descriptor",
    "(Tensor grad, Tensor packed, Tensor gate, Tensor constant, SymInt representative, SymInt groups, "
    "SymInt stride) -> Tensor",
    f"{_GRADIENTS}:input_grad",
    f"{_GRADIENTS}:empty_input_grad",
)
