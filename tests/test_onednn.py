"""Layers that oneDNN's convolutions in channels_last get wrong, as PyTorch 2.14.1 ships it: the native path must not.

In a process whose fresh memory is filled with a pattern, so that what is read before it was written shows.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from cases import Case
from fresh import run_python

TESTS = Path(__file__).parent

WRONG = (
    # As "dilated-rows" below; Inductor's code of this one's backward is no C++ (PyTorch 2.14.1).
    Case("dilated-rows-alone", 2, 12, 8, (33, 41), (5, 3), (1, 1), (6, 1), (3, 1), alpha=1.0),
    # Windows that lie in the padding as a whole: a crash.
    Case("column-of-padding", 1, 11, 1, (2, 1), (5, 1), (2, 2), (2, 1), (1, 2), groups=1, alpha=0.3),
    Case("frame-of-padding", 1, 7, 2, (4, 1), (1, 1), (3, 2), (3, 1), groups=1, alpha=0.6),
    Case("dilated-around-the-image", 2, 8, 4, (1, 1), (3, 3), (1, 1), (3, 3), (2, 2)),
    # One channel in a group, and a stride along the row.
    Case("one-channel-groups", 2, 8, 12, (4, 5), (3, 3), (1, 3), (1, 0), groups=4),
    Case("one-channel", 3, 4, 2, (8, 3), (5, 5), (1, 3), (3, 2), groups=1, alpha=0.25),
    # Rows shorter than the stride: gradients of bfloat16 weights.
    Case("one-column", 3, 32, 8, (6, 1), (3, 3), (2, 2), (0, 1), groups=4),
    Case("two-columns", 3, 16, 8, (4, 2), (5, 3), (1, 3), (2, 2)),
    # A row of outputs is one pixel, and columns have a stride: bfloat16 with AMX.
    Case("two-columns-to-one", 2, 16, 8, (7, 2), (3, 3), (1, 2), (1, 1)),
    Case("row-of-taps", 2, 48, 16, (14, 40), (1, 5), (3, 1), (0, 6), (1, 3), groups=1),
    Case("five-columns-to-one", 3, 16, 16, (9, 5), (3, 5), (2, 3), (1, 1), groups=1),
    # Rows apart, channels of a group no multiple of 16, long rows: gradients of bfloat16 weights.
    Case("dilated-rows", 2, 16, 12, (34, 40), (3, 3), (1, 1), (2, 2), (2, 2)),
    Case("dilated-rows-24", 2, 96, 12, (34, 40), (3, 3), (1, 1), (2, 2), (2, 2)),
)

CODE = """\
import sys
sys.path[:0] = sys.argv[1:3]
import random
import torch
from cases import Case, assert_agrees, make_inputs
from spconv_triton.functional import spconv2d
torch.manual_seed(int(sys.argv[3]))
random.seed(int(sys.argv[3]))
compiler = sys.argv[5]
compiles = compiler != "none"
layer = torch.compile(spconv2d, fullgraph=True, backend=compiler) if compiles else spconv2d
for case in eval(sys.argv[4]):
    print(case, "in", flush=True)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if compiles:  # which takes seconds
        dtypes = (torch.bfloat16,) if compiler == "inductor" else (random.choice(dtypes),)
    for dtype in dtypes:
        print("  ", dtype, flush=True)
        for _ in range(1 if compiles else 3):
            torch._dynamo.reset()
            inputs = make_inputs(case, dtype, branch_bias=True)
            assert_agrees(layer, inputs, perturbations=4, backend="native")
            if compiles:
                arguments, options = inputs.positional(), {"branch_bias": inputs.branch_bias, **inputs.window}
                with torch.no_grad():
                    y, expected = layer(*arguments, **options), spconv2d(*arguments, **options)
                torch.testing.assert_close(y, expected, rtol=0, atol=0.05 * expected.abs().max().item())
print("all agree")
"""


@pytest.mark.parametrize("compiler", ["none", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_agrees(compiler: str, tmp_path: Path) -> None:
    seed = int(torch.randint(2**31, ()))
    # Every case is compiled twice.
    chance = random.Random(seed)
    wrong = {"none": WRONG, "aot_eager": chance.sample(WRONG, 6), "inductor": chance.sample(WRONG[4:], 4)}[compiler]
    cases = f"[Case(**fields) for fields in {[vars(case) for case in wrong]}]"
    printed = run_python(CODE, tmp_path, TESTS, TESTS.parent, str(seed), cases, compiler, MALLOC_PERTURB_="165")
    assert printed.endswith("all agree\n")
