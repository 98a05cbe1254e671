"""One way down, nothing points back: the import direction, read off the sources.

    modules -> functional -> ops -> launch -> kernels

Everything else hangs off the side: ``reference`` stands alone, helpers know nothing of the chain, applications
(models, conversion, training) sit on top and nobody imports ``training``.
"""

from __future__ import annotations

import ast
import graphlib
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import spconv_triton

PACKAGE = Path(spconv_triton.__file__).parent

CHAIN = ("modules", "functional", "ops", "launch", "kernels")
HELPERS = (
    "arguments",
    "autocast",
    "branch_norm",
    "channels",
    "checks",
    "dispatch",
    "epilogue",
    "files",
    "flop_formulas",
    "folded_norms",
    "geometry",
    "hooks",
    "kept",
    "layout",
    "surgery",
    "optional_arguments",
    "recomputation",
    "registration",
    "symbols",
    "watch",
)

# Imports inside functions, (importer, imported): why. Each one costs its callers an import they did not see coming.
LATE_IMPORTS: dict[tuple[str, str], str] = {
    ("", "tuning"): "which few programs need",
    ("", "explanation"): "tracing and profiling would double the time of importing the package",
    ("", "network_summary"): "PyTorch's counter of operations imports triton, which doubles the time, too",
    ("", "fusing"): "tracing, which those who train do not need",
    ("training.cli", "training.demo"): "--help and a mistyped option answer at once",
    ("training.cli", "training.loop"): "--help and a mistyped option answer at once",
}


class Import(NamedTuple):
    """``importer`` and ``imported`` are dotted names below the package ("kernels.tiles"); "" is the package itself.

    ``imported`` is absolute ("torch.nn") where ``external``.
    """

    importer: str
    imported: str
    external: bool = False
    late: bool = False


def read_imports(package: Path) -> list[Import]:
    """Every import statement under ``package``, links followed."""
    files = {
        ".".join((Path(folder) / name).relative_to(package).with_suffix("").parts): Path(folder) / name
        for folder, _, names in os.walk(package, followlinks=True)
        for name in names
        if name.endswith(".py")
    }
    modules = {name.removesuffix("__init__").removesuffix(".") for name in files}
    found = []
    for name, file in files.items():
        importer = name.removesuffix("__init__").removesuffix(".")
        parent = name.split(".")[:-1]
        for node, late in _statements(ast.parse(file.read_text(), str(file)), late=False):
            if isinstance(node, ast.Import):
                found += [Import(importer, alias.name, external=True, late=late) for alias in node.names]
            elif node.level == 0:
                found.append(Import(importer, str(node.module), external=True, late=late))
            else:
                base = [*parent[: len(parent) + 1 - node.level], *(node.module or "").split(".")]
                start = ".".join(filter(None, base))
                for alias in node.names:
                    below = f"{start}.{alias.name}".removeprefix(".")
                    found.append(Import(importer, below if below in modules else start, late=late))
    return found


def _statements(node: ast.AST, *, late: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, late
        else:
            inside = late or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _statements(child, late=inside)


def top(name: str) -> str:
    return name.partition(".")[0]


def is_aten(name: str) -> bool:
    """The paths on ATen alone: ``reference`` and the package ``native``."""
    return name == "reference" or top(name) == "native"


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    found = read_imports(PACKAGE)
    assert {"modules", "functional", "reference"} <= {i.importer for i in found}, f"sources not found in {PACKAGE}"
    return found


@pytest.fixture(scope="module")
def internal(imports: list[Import]) -> list[Import]:
    return [i for i in imports if not i.external]


def test_reader_sees_every_form(tmp_path: Path) -> None:
    """The rules below are only as good as the reader."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "__init__.py").write_text("from . import a\nfrom .sub import b\n")
    (tmp_path / "a.py").write_text("import torch.nn, math\nif True:\n    from .sub.b import c as d\n")
    (tmp_path / "sub" / "__init__.py").write_text("from .b import c\n")
    (tmp_path / "sub" / "b.py").write_text(
        "def f():\n    from .. import a\n    from ..a import x\ntry:\n    c = 1\nfinally:\n    from os import path\n"
    )
    (tmp_path / "link").symlink_to(tmp_path / "sub", target_is_directory=True)
    expected = {
        Import("", "a"),
        Import("", "sub.b"),
        Import("a", "torch.nn", external=True),
        Import("a", "math", external=True),
        Import("a", "sub.b"),
        Import("sub", "sub.b"),
        Import("link", "link.b"),
        *(Import(f"{folder}.b", "a", late=True) for folder in ("sub", "link")),
        *(Import(f"{folder}.b", "os", external=True) for folder in ("sub", "link")),
    }
    assert set(read_imports(tmp_path)) == expected


def test_chain_goes_one_step_down(internal: list[Import]) -> None:
    steps = dict(itertools.pairwise(CHAIN))
    wrong = [
        i
        for i in internal
        if top(i.importer) in CHAIN
        and top(i.imported) in CHAIN
        and top(i.importer) != top(i.imported)
        and steps.get(top(i.importer)) != top(i.imported)
    ]
    assert not wrong


@pytest.mark.parametrize("layer", CHAIN)
def test_layers_import_nothing_above(internal: list[Import], layer: str) -> None:
    below = {*CHAIN[CHAIN.index(layer) :], *HELPERS}
    imported = {top(i.imported) for i in internal if top(i.importer) == layer}
    assert {name for name in imported if not is_aten(name)} <= below


def test_only_launch_imports_kernels(internal: list[Import]) -> None:
    importers = {top(i.importer) for i in internal if top(i.imported) == "kernels"}
    assert importers - {"kernels"} <= {"launch"}


def test_kernels_import_triton_and_each_other(imports: list[Import]) -> None:
    ours = [i for i in imports if top(i.importer) == "kernels"]
    external = {top(i.imported) for i in ours if i.external}
    assert external <= {"triton", *sys.stdlib_module_names}
    assert {top(i.imported) for i in ours if not i.external} <= {"kernels"}


def test_only_kernels_and_their_launch_import_triton(imports: list[Import]) -> None:
    """Everything else must work where triton is not installed."""
    importers = {top(i.importer) for i in imports if i.external and top(i.imported) == "triton"}
    assert importers <= {"dispatch", "kernels", "launch", "tuning"}  # dispatch looks whether it imports at all


def test_reference_imports_torch_only(imports: list[Import]) -> None:
    ours = [i for i in imports if i.importer == "reference"]
    assert not [i for i in ours if not i.external]
    assert {top(i.imported) for i in ours} <= {"torch", "__future__", "math", "collections", "typing"}


def test_helpers_import_helpers_only(internal: list[Import]) -> None:
    assert {i.imported for i in internal if i.importer in HELPERS} <= set(HELPERS)


def test_aten_paths_import_no_chain(internal: list[Import]) -> None:
    imported = {i.imported for i in internal if is_aten(i.importer)}
    assert "geometry" in imported
    assert {name for name in imported if not is_aten(name)} <= set(HELPERS)


def test_models_import_modules_only(internal: list[Import]) -> None:
    assert {i.imported for i in internal if i.importer == "models"} <= {"channels", "modules"}


def test_conversion_is_built_on_the_layer(internal: list[Import]) -> None:
    """The layer and what computes it know nothing of the networks that it is put into."""
    above = {"conversion", "dense", "eligibility", "network_summary"}
    assert {i.imported for i in internal if i.importer in above} <= {*above, *HELPERS, "fused", "modules"}
    assert {top(i.importer) for i in internal if i.imported in above} <= {*above, "", "training"}


def test_fusing_is_built_on_the_layer(internal: list[Import]) -> None:
    above = {"fused", "fusing"}
    below = {"functional", "modules", *HELPERS}
    ours = {top(i.imported) for i in internal if top(i.importer) in above and not is_aten(i.imported)}
    assert ours <= {*above, *below}
    importers = {top(i.importer) for i in internal if top(i.imported) in above}
    assert importers <= {*above, "", "eligibility", "network_summary"}


def test_nobody_imports_training(internal: list[Import]) -> None:
    importers = {top(i.importer) for i in internal if top(i.imported) == "training"}
    assert importers <= {"training", "__main__"}


def test_package_imports_itself_relatively(imports: list[Import]) -> None:
    assert not [i for i in imports if i.external and top(i.imported) in ("spconv_triton", "kernels")]


def test_no_import_hides_in_a_function(internal: list[Import]) -> None:
    late = {(i.importer, i.imported) for i in internal if i.late}
    assert late == set(LATE_IMPORTS), "late imports without a reason, or reasons without an import"


def test_no_cycles(internal: list[Import]) -> None:
    graph: dict[str, set[str]] = {}
    for i in internal:
        graph.setdefault(i.importer, set()).add(i.imported)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules
