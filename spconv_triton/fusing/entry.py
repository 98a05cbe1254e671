"""Folding what follows SPConv layers into them, for inference."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..arguments import check_callable, check_flag, check_module
from ..modules import SPConv2d
from ..surgery import check_is_plain
from .copying import copied, with_norms_apart
from .plan import Plan
from .report import Fusion


def fuse(model: nn.Module, *, plain_norms: bool = False, report: Callable[[Fusion], object] | None = None) -> nn.Module:
    """A copy of ``model`` for inference, whose SPConv layers compute what follows them before writing their output.

    Into a layer fold, in this order: the norms in its branches; an ``nn.BatchNorm2d`` or ``nn.SyncBatchNorm``; the
    addition of a residual (``+``, ``+=``, ``torch.add``, ``add_``); ReLU, ReLU6 or SiLU (module or function). The
    layer is then a :class:`spconv_triton.fused.FusedSPConv2d`, and has no parameters. Results are the model's to within
    rounding. Anything else is as it was, unless ``plain_norms`` asks for the norms behind plain convolutions too.

    The graph is read by ``torch.fx``. Modules that cannot be traced, because of control flow say, are left as they are,
    and the parts that they call, as far as their source tells, are fused each on its own. Where a norm and an
    activation are modules of their own, nothing else calls them and no residual is added, ``nn.Identity`` takes their
    places. Else the module in whose forward they are called becomes a ``torch.fx.GraphModule``, which has its parts
    under their names but is of no class of its own. timm's ``BatchNormAct2d``, a norm and an activation in one, becomes
    a sequence of the two first.

    A layer stays, with the reason in the report, where its result is used more than once or is a result of the network;
    where an activation stands before the norm; where a norm is in training mode, has no running statistics, another
    dtype or hooks; where calls of it are followed by different things; where a forward has optional arguments, which
    may change what follows; where a forward asks what a symbol cannot answer (types, gradients, autocast), keeps what
    it computes, or looks into parts of which less would be left; where a forward that cannot be traced may do more with
    it, or with what follows, than call the part around both; where a list or another attribute holds it beside the
    network's own tree; and where the layer, or what would have to be rewritten, has hooks.

    What is fused is the forward as it is now. Other methods that stop before a norm find it in the layer already, and
    flags that are set on the copy later change nothing.

    Args:
        model: in eval mode. Compile it and export it afterwards.
        plain_norms: whether to fold batch norms into ``nn.Conv2d`` as well, each where it alone reads the convolution's
            result, by ``torch.nn.utils.fusion.fuse_conv_bn_eval``.
        report: called with the :class:`.Fusion`; ``print`` will do.

    Returns:
        The copy; ``model`` stays as it was, to be trained further. Fusing the copy again changes nothing. The copy
        has no gradients: call it under ``torch.inference_mode()`` or ``torch.no_grad()``, and to train, go back to
        ``model``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a model of which an SPConv layer or a module around it is in training mode, or that is scripted,
            compiled, wrapped in DDP or sharded by FSDP.
    """
    check_module(model)
    check_flag("plain_norms", plain_norms)
    check_callable("report", report)
    check_is_plain(model, "fuse")
    _check_mode(model)
    model = with_norms_apart(copied(model))
    plan = Plan(model, plain_norms)
    if report is not None:
        report(plan.report())
    return plan.carry_out()


def _check_mode(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training and any(isinstance(part, SPConv2d) for part in module.modules()):
            where = f"its {name}" if name else "it"
            raise ValueError(f"model must be in eval mode, but {where} is in training mode; call model.eval() first")
