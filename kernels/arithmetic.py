"""Sizes on the host, for tables and launches: a call of ``triton.cdiv`` from Python takes several microseconds."""


def cdiv(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return (size + block - 1) // block


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is not below a positive ``size``."""
    return 1 << (size - 1).bit_length()
