"""SPConv ("Split to Be Slim", IJCAI 2020) as a drop-in convolution. Importing this registers its operators."""

from typing import TYPE_CHECKING, Any

from . import functional, models, reference
from .checkpoints import load_reference_checkpoint
from .conversion import convert
from .modules import SPConv2d
from .recomputation import set_recompute

if TYPE_CHECKING:
    from .explanation import explain
    from .fusing import fuse
    from .network_summary import summary
    from .tuning import load_tuning, save_tuning

__all__ = [
    "SPConv2d",
    "convert",
    "explain",
    "functional",
    "fuse",
    "load_reference_checkpoint",
    "load_tuning",
    "models",
    "reference",
    "save_tuning",
    "set_recompute",
    "summary",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "explain":  # tracing and profiling, which few programs need, double the time of the import
        from .explanation import explain

        return explain
    if name == "fuse":  # tracing, likewise
        from .fusing import fuse

        return fuse
    if name == "summary":  # PyTorch's counter of operations, which imports triton
        from .network_summary import summary

        return summary
    if name in ("load_tuning", "save_tuning"):  # which few programs need, likewise
        from . import tuning

        return getattr(tuning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
