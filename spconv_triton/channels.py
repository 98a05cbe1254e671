"""How many channels are representative: alpha L, and which alpha a layer can have."""

from __future__ import annotations

import math

from .arguments import check_count

DEFAULT_ALPHA = 0.5
"""The paper's main setting."""

DEFAULT_GROUPS = 2
"""G of the group-wise convolution, likewise."""


def count_representative(in_channels: int, out_channels: int, groups: int, alpha: float) -> int:
    """alpha L = int(L alpha), the representative channels of a layer.

    Args:
        in_channels, out_channels: L and M.
        groups: G, at least 1.
        alpha: share of representative channels.

    Returns:
        alpha L, a positive multiple of G.

    Raises:
        TypeError: channel counts that are not ints, or an alpha that is not a number.
        ValueError: channel counts below 1, alpha outside (0, 1], or an alpha L or M that G does not divide.
    """
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
        check_count(name, value)
    _check_alpha(alpha)
    representative = int(in_channels * alpha)
    if representative < groups or representative % groups:
        raise ValueError(
            f"alpha must leave a positive multiple of groups={groups} representative channels, got alpha={alpha}, "
            f"which makes int({in_channels} * {alpha}) = {representative} of in_channels={in_channels}"
        )
    if out_channels % groups:
        raise ValueError(f"groups must divide out_channels={out_channels}, got groups={groups}")
    return representative


def legal_alpha(in_channels: int, alpha: float, groups: int = 2) -> float:
    """The alpha closest below ``alpha`` that leaves a multiple of ``groups`` representative channels, else the least.

    The paper's ratios reach below what narrow layers can have: 1/16 of 16 channels is 1, and G = 2 needs 2. Such a
    layer gets the fewest channels it can have. The paper's own networks at its own ratios are never changed.

    Args:
        in_channels: L, at least ``groups``.
        alpha: ratio in (0, 1].
        groups: G.

    Returns:
        The ratio; ``alpha`` itself where it is legal.

    Raises:
        TypeError: counts that are not ints, or an alpha that is not a number.
        ValueError: counts below 1, alpha outside (0, 1], or fewer channels than groups.
    """
    for name, value in (("in_channels", in_channels), ("groups", groups)):
        check_count(name, value)
    _check_alpha(alpha)
    if groups > in_channels:
        raise ValueError(f"groups must be between 1 and in_channels={in_channels}, got {groups}")
    representative = int(in_channels * alpha)
    rounded = max(representative // groups, 1) * groups
    if rounded == representative:
        return alpha
    legal = rounded / in_channels
    return legal if int(in_channels * legal) == rounded else math.nextafter(legal, 1)  # int(44 * (30 / 44)) is 29


def _check_alpha(alpha: object) -> None:
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise TypeError(f"alpha must be a number, got {alpha!r}")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}")
