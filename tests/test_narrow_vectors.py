"""Processors without AVX-512, as which this one can be told to compute: there oneDNN adds up in another order."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import RESNET50, Case, assert_agrees_over_draws, make_inputs, native

from spconv_triton import set_recompute

NARROW = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}

LONG_SUMS = {
    "kept": (replace(RESNET50[1], batch=8), False),
    "one group": (replace(RESNET50[0], batch=4, groups=1), False),
    "a stride": (Case("128@56/2", 4, 128, 128, (56, 56), stride=(2, 2)), False),
    "made again": (Case("256@12", 32, 256, 256, (12, 12)), True),
}
"""Layers whose blocks of Wp are folded into the group-wise weight, and whose weight gradients sum over many pixels;
and whether they compute U3 - U1 again."""


def agree(name: str) -> None:
    case, recompute = LONG_SUMS[name]

    with set_recompute(recompute):
        assert_agrees_over_draws(native, lambda: make_inputs(case), 2)


def test_long_sums_at_a_stride() -> None:
    agree("a stride")


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this processor is no wider")
def test_long_sums_without_avx512() -> None:
    environment = {**os.environ, **NARROW}
    command = [sys.executable, __file__, str(int(torch.randint(2**31, ())))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n") == [f"AVX2: {name}" for name in LONG_SUMS] + [""]


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[1]))
    for each in LONG_SUMS:
        agree(each)
        print(f"{torch.backends.cpu.get_cpu_capability()}: {each}")
