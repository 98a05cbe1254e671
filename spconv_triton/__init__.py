"""SPConv ("Split to Be Slim", IJCAI 2020) as a drop-in convolution. Importing this registers its operators."""

from . import functional, reference
from .modules import SPConv2d

__all__ = ["SPConv2d", "functional", "reference"]
__version__ = "0.1.0"
