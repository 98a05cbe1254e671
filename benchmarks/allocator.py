"""Free memory that stays with the process, however large the map was: nobody is timed by page faults."""

import ctypes

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""glibc's, from malloc.h."""

MOST_FREE = 2**31 - 1
"""Bytes at the end of the heap that are kept: the most that ``mallopt`` takes."""

LARGEST_LEARNT = 32 << 20
"""Bytes. From a freed block below this, glibc learns what to keep: twice as much, at the end of its heap."""


def settle() -> None:
    """Have the allocator keep what is freed, instead of giving it back and asking for it again, after a few calls.

    By default glibc keeps a few times the largest tensor that was ever freed, and nothing of one from 32 MiB on: each
    call then pays a page fault for every 4 KiB of its maps, up to half of its time. Below that it depends on the order
    in which tensors happen to be freed. Above it each pays for every map that it makes whole: of 64 x 64 x 56 x 56 in
    float32 forward 12,545 faults nn.Conv2d and SPConv, which works through such a batch in parts, for their output
    alone, 37,635 HetConv, and some 90,000 the reference.

    Where libc has no ``mallopt``, one freed block teaches it what it can learn, and larger tensors stay as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # another libc; no libc of that kind at all
        mallopt = None
    if mallopt is None or not (mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, MOST_FREE)):
        block = torch.empty(LARGEST_LEARNT - (64 << 10), dtype=torch.uint8)
        del block
