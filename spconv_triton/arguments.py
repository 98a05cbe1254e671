"""What is checked about arguments that are no tensors."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def check_one_of(name: str, value: object, legal: Collection[str]) -> None:
    """``value`` is one of the words.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str) or value not in legal:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, legal))}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """``value`` is a bool.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_count(name: str, value: object) -> None:
    """``value`` is an int of at least 1.

    Raises:
        TypeError: not an int.
        ValueError: below 1.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_callable(name: str, value: object) -> None:
    """``value`` may be called, or is None.

    Raises:
        TypeError: neither.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be callable or None, got {value!r}")


def check_module(model: object) -> None:
    """``model`` is a module.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
