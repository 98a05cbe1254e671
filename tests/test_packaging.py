"""What is published: one top-level package, with the kernels of `kernels/` inside it as `spconv_triton.kernels`."""

from __future__ import annotations

import email
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from fresh import run_python

import spconv_triton

ROOT = Path(__file__).parents[1]


class Built(NamedTuple):
    tree: Path
    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Distributions of a copy without what git ignores: no product of an earlier build can help."""
    folder = tmp_path_factory.mktemp("packaging")
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".git", *ignored))

    def build(out: Path, *options: str) -> None:
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, *options, tree]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    build(folder / "both")  # the sdist, and a wheel from what it unpacks to
    build(folder / "direct", "--wheel")
    (sdist,) = (folder / "both").glob("*.tar.gz")
    (wheel_of_sdist,) = (folder / "both").glob("*.whl")
    (wheel,) = (folder / "direct").glob("*.whl")
    return Built(tree, wheel, sdist, wheel_of_sdist)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sources(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.py")}


def test_wheel_claims_one_top_level_name(built: Built) -> None:
    tops = {name.split("/")[0] for name in contents(built.wheel)}
    assert tops == {"spconv_triton", f"split_conv_triton-{spconv_triton.__version__}.dist-info"}


def test_wheel_holds_every_module(built: Built) -> None:
    expected = {f"spconv_triton/{name}": text for name, text in sources(built.tree / "spconv_triton").items()}
    expected |= {f"spconv_triton/kernels/{name}": text for name, text in sources(built.tree / "kernels").items()}
    assert "spconv_triton/kernels/__init__.py" in expected
    assert {name: text for name, text in contents(built.wheel).items() if name.endswith(".py")} == expected


def test_wheel_holds_files_not_links(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
    assert not [name for name, mode in modes.items() if stat.S_ISLNK(mode)]


def test_wheel_is_typed_and_licensed(built: Built) -> None:
    held = contents(built.wheel)
    info = f"split_conv_triton-{spconv_triton.__version__}.dist-info"
    assert "spconv_triton/py.typed" in held
    assert held[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    metadata = email.message_from_bytes(held[f"{info}/METADATA"])
    assert metadata["Name"] == "split-conv-triton"
    assert metadata["Version"] == spconv_triton.__version__
    assert metadata["License-Expression"] == "MIT"
    required = {line.split(";")[0].split(">")[0].strip() for line in metadata.get_all("Requires-Dist", [])}
    assert {"torch", "triton", "einops"} <= required


def test_sdist_builds_the_same_wheel(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    first, second = contents(built.wheel), contents(built.wheel_of_sdist)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_wheel_installs_and_runs(built: Built, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target]
    subprocess.run([*command, built.wheel], stdin=subprocess.DEVNULL, check=True)
    code = """
import importlib.util, pathlib, sys, torch, spconv_triton, spconv_triton.kernels
target = pathlib.Path(sys.argv[1]).resolve()
for module in (spconv_triton, spconv_triton.kernels):
    assert target in pathlib.Path(module.__file__).resolve().parents, module.__file__
assert importlib.util.find_spec("kernels") is None
print(list(spconv_triton.SPConv2d(4, 4, 3)(torch.ones(1, 4, 5, 5)).shape))
"""
    assert run_python(code, tmp_path, target, PYTHONPATH=str(target)) == "[1, 4, 3, 3]\n"
