"""Free memory that stays with the process, as it does in any that has held more than a layer."""

import torch

LARGEST_LEARNT = 32 << 20
"""Bytes. From a freed block below this, glibc learns what to keep: twice as much, at the end of its heap."""


def settle() -> None:
    """Have glibc keep what is freed, up to 64 MiB, instead of giving it back and asking for it again.

    By default it keeps a few times the largest tensor that was ever freed. A small process then pays a page fault for
    every 4 KiB of a map in one call and not in the next, up to half of its time, by the order in which tensors happen
    to be freed. A process that has held one batch of images is past that, and so are all competitors after this.
    """
    block = torch.empty(LARGEST_LEARNT - (64 << 10), dtype=torch.uint8)
    del block
