"""An ahead-of-time package: compiled here, run where this library is not imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from fresh import run_python
from small_network import small_network
from torch.export import Dim

from spconv_triton import SPConv2d

RUN = """
import sys
import torch

folder = sys.argv[1]
network = torch._inductor.aoti_load_package(f"{folder}/network.pt2")
for x, expected in torch.load(f"{folder}/pairs.pt", weights_only=True):
    torch.testing.assert_close(network(x), expected)
assert not [name for name in sys.modules if name.startswith("spconv_triton")]
print("agrees")
"""


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Inductor's own
def test_package_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    """A converted network with norms in its branches, for any batch."""
    network = small_network(branch_norm=True).eval()
    assert any(isinstance(module, SPConv2d) and module.stride == (2, 2) for module in network.modules())
    program = torch.export.export(
        network, (torch.randn(3, 3, 9, 8),), dynamic_shapes=({0: Dim("batch", min=1, max=64)},)
    )
    package = tmp_path / "network.pt2"
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=quick)
    inputs = [torch.randn(batch, 3, 9, 8) for batch in (1, 3, 6)]
    torch.save([(x, network(x)) for x in inputs], tmp_path / "pairs.pt")
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    assert run_python(RUN, tmp_path, tmp_path, **threads) == "agrees\n"
