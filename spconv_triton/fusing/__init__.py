"""Folding what follows the SPConv layers of a network into them, for inference.

``entry`` checks and copies a network (``copying``), ``plan`` decides what folds and carries it out, ``report`` prints
it. The plan reads the network as graphs (``regions``), the calls behind a layer in them (``chains``), and what code
that cannot be traced does with its parts (``reach``, from its ``sources``); ``module_changes`` undoes what tracing a
forward changed. ``plain_norms`` is the same for norms behind plain convolutions.
"""

from .entry import fuse
from .report import Fold, Fusion

__all__ = ["Fold", "Fusion", "fuse"]
