"""What ``import spconv_triton`` pulls in and needs, each in a fresh process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fresh import run_python

# Slow to import or optional; none of them is needed to run a layer.
UNWANTED = ("sklearn", "matplotlib", "rich", "torchvision", "timm", "torch._inductor", "torch._dynamo", "triton")

USE_LAYER = """
import torch
import spconv_triton
layer = spconv_triton.SPConv2d(8, 6, 3, padding=1)
x = torch.randn(2, 8, 5, 4, requires_grad=True)
y = layer(x)
assert y.shape == (2, 6, 5, 4), y.shape
y.square().mean().backward()
for name, tensor in {"x": x, **dict(layer.named_parameters())}.items():
    assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), name
"""

# A finder that raised would not be the same: importlib.util.find_spec answers None for what is not installed.
HIDE_TRITON = """
import sys

class WithoutTriton:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [WithoutTriton(finder) for finder in sys.meta_path]
"""

REFUSED = """
try:
    spconv_triton.functional.spconv2d(
        x, layer.weight_gwc, layer.weight_pwc, layer.weight_redundant, padding=1, backend="triton"
    )
except ValueError as error:
    print(error)
"""


def test_import_is_light(tmp_path: Path) -> None:
    code = "import json, sys; before = set(sys.modules); import torch; mid = set(sys.modules); import spconv_triton"
    report = json.loads(
        run_python(f"{code}; print(json.dumps([sorted(mid - before), sorted(set(sys.modules) - mid)]))", tmp_path)
    )
    torch_brings, ours = map(set, report)
    assert "spconv_triton.modules" in ours, "the process imported another spconv_triton"
    assert "torch" in torch_brings
    assert not ours.intersection(UNWANTED)


def test_a_layer_on_a_cpu_does_without_triton(tmp_path: Path) -> None:
    """Which takes longer to import than the package."""
    run_python(
        f"{USE_LAYER}\nimport sys\nassert not [n for n in sys.modules if n.partition('.')[0] == 'triton']", tmp_path
    )


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "spconv_triton"])
def test_formulas_are_registered_whoever_comes_first(tmp_path: Path, first: str) -> None:
    code = f"""
import importlib, sys
importlib.import_module({first!r})
import spconv_triton, torch
import torch.utils.flop_counter as counter
packets = ("spconv2d", "spconv2d_backward", "spconv2d_inference", "onepass_descriptor", "weight_grad_descriptor")
for name in packets:
    assert getattr(torch.ops.spconv_triton, name) in counter.flop_registry, name
assert counter.__loader__ is counter.__spec__.loader
assert type(counter.__loader__).__name__ == "SourceFileLoader", counter.__loader__
assert not [f for f in sys.meta_path if type(f).__module__.startswith("spconv_triton")]
"""
    run_python(code, tmp_path)


def test_import_and_use_on_a_cpu_ask_nothing_of_cuda(tmp_path: Path) -> None:
    """Also where there is a GPU: a process that forks workers must not have a CUDA context."""
    code = f"""
import torch

asked = []
for name in ("is_available", "device_count", "current_device", "get_device_properties", "get_device_capability",
             "get_device_name", "init", "_lazy_init"):
    original = getattr(torch.cuda, name)
    setattr(torch.cuda, name, lambda *a, _n=name, _f=original, **k: (asked.append(_n), _f(*a, **k))[1])
torch.cuda.is_available()
assert asked == ["is_available", "device_count"] or asked == ["is_available"], asked
asked.clear()
{USE_LAYER}
print(asked, torch.cuda.is_initialized())
"""
    assert run_python(code, tmp_path) == "[] False\n"


def test_without_triton(tmp_path: Path) -> None:
    code = f"""
{HIDE_TRITON}
import importlib.util
assert importlib.util.find_spec("triton") is None
{USE_LAYER}
{REFUSED}
import spconv_triton
from spconv_triton import *
assert {{*spconv_triton.__all__}} <= {{*dir(spconv_triton)}} & {{*globals()}}
assert "triton" not in sys.modules
"""
    message = run_python(code, tmp_path)
    assert "backend='triton'" in message
    assert "triton is not installed" in message
    assert "'native'" in message


@pytest.mark.parametrize("hidden", [False, True], ids=["as installed", "without triton"])
def test_operators_that_are_exported_are_there(tmp_path: Path, hidden: bool) -> None:
    code = f"""
{HIDE_TRITON if hidden else ""}
from spconv_triton import dispatch, ops
from spconv_triton.ops import *
assert {{*ops.__all__}} <= {{*globals()}}
assert bool(ops.__all__) == dispatch.HAS_TRITON
assert not {hidden} or not dispatch.HAS_TRITON
import torch
assert hasattr(torch.ops.spconv_triton, "native_gap_softmax_fusion")
assert hasattr(torch.ops.spconv_triton, "spconv2d") == dispatch.HAS_TRITON
"""
    run_python(code, tmp_path)


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_with_a_triton_that_does_not_import(tmp_path: Path, error: str) -> None:
    """A wheel for another platform or Python is found, and then fails; a CPU has no use for it anyway."""
    broken = tmp_path / "broken" / "triton"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(f"raise {error}('libtriton.so: cannot open shared object file')\n")
    reason = "from spconv_triton.dispatch import why_no_triton\nassert 'libtriton.so' in why_no_triton()\n"
    message = run_python(USE_LAYER + reason + REFUSED, tmp_path, PYTHONPATH=str(broken.parent))
    assert "backend='triton'" in message
    assert "libtriton.so" in message or "not on a GPU" in message


@pytest.mark.parametrize("variable", ["0", "1"])
def test_interpreter_flag_is_read_once(tmp_path: Path, variable: str) -> None:
    code = """
import os, spconv_triton
from spconv_triton import dispatch
first = dispatch.INTERPRETED
os.environ["TRITON_INTERPRET"] = "0" if first else "1"
import torch
try:
    print(first, dispatch.choose(torch.ones(1), "triton"))
except ValueError as error:
    print(first, error)
"""
    output = run_python(code, tmp_path, TRITON_INTERPRET=variable)
    assert output.startswith("True triton" if variable == "1" else "False backend='triton' cannot run here"), output


def test_kernels_claim_no_top_level_name(tmp_path: Path) -> None:
    """Hugging Face owns `kernels`; ours is reachable only below ``spconv_triton``, in an editable install too."""
    code = """
import importlib.util
assert importlib.util.find_spec("kernels") is None
import spconv_triton.kernels
assert spconv_triton.kernels.__file__ is not None, "a namespace package: the modules were not packaged"
"""
    run_python(code, tmp_path)
