"""The documentation says what is so: its examples run and print what it shows, and no public name is left out."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import itertools
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from published import as_published

import spconv_triton
from docs import examples, figure
from docs.examples import FOLDER
from spconv_triton import functional, models, reference
from spconv_triton.training.cli import make_parser

ROOT = FOLDER.parent

README = ROOT / "README.md"

PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *examples.pages()]

WITH_COMMANDS = [page for page in PAGES if examples.commands(page)]

EXACT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("page", [p for p in examples.pages() if examples.examples(p)], ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore:No complete tensor found in the group:UserWarning")  # torch.export.load's
def test_examples_print_what_the_page_shows(page: Path) -> None:
    for example, printed in examples.run(page):
        right = doctest.OutputChecker().check_output(f"{example.output}\n", f"{printed}\n", EXACT)
        assert right, f"{page.name}:{example.line} prints\n{printed}\ninstead of\n{example.output}"


def test_examples_of_the_readme_run() -> None:
    """One after the other; what they print is not shown there."""

    def checkpoint() -> None:
        torch.save(as_published(models.resnet50(alpha=0.5)).state_dict(), "model.pth")

    pytest.importorskip("torchvision")
    found = list(examples.run(README, checkpoint))
    assert len(found) == README.read_text().count("```py") >= 4


def test_every_page_with_python_is_run() -> None:
    """Blocks that the pattern of ``examples`` misses would be shown and never run."""
    counts = {page.name: len(examples.examples(page)) for page in examples.pages()}
    assert counts == {page.name: page.read_text().count("```py") for page in examples.pages()}
    assert sum(counts.values()) > 15


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: "-".join(page.relative_to(ROOT).parts))
def test_commands_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for command in examples.commands(page):
        words = list(itertools.dropwhile(lambda word: "=" in word, command))
        program = Path(words[0]).name
        if program == "make":
            variables = [word.partition("=")[0] for word in words[1:] if "=" in word]
            assert {*words[1:]} - targets <= {word for word in words if "=" in word}, command
            assert all(re.search(rf"\b{name}\b", makefile) for name in variables), command
        elif "spconv_triton" in words:
            make_parser().parse_args(words[words.index("spconv_triton") + 1 :])
        elif program == "python":
            assert words[1] == "-m", command
            check_options(words[2], words[3:])
        elif program == "pytest":
            check_selection(words[1:])
        elif program == "git":
            assert (ROOT / words[2].partition(":")[2]).exists(), command
        else:
            assert words[:2] == ["pip", "install"], command


def check_options(module: str, words: list[str]) -> None:
    """``python -m module`` is there, and its help names the options among ``words``."""
    found = importlib.util.find_spec(module)
    assert found, module
    options = [word for word in words if word.startswith("--")]
    if not options:
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        importlib.import_module(f"{module}.__main__" if found.submodule_search_locations else module).main(["--help"])
    for option in options:
        assert re.search(rf"{option}(?![\w-])", printed.getvalue()), f"python -m {module} has no {option}"


def check_selection(words: list[str]) -> None:
    """``pytest`` with these arguments finds its files, and in them a test for what ``-k`` says."""
    paths = [ROOT / word for word in words if (ROOT / word).exists()]
    assert paths, words
    for flag, expression in itertools.pairwise(words):
        if flag == "-k":
            assert re.search(rf"def test_\w*{expression}", paths[0].read_text()), words


def test_the_pages_with_commands_are_found() -> None:
    names = {str(page.relative_to(ROOT)) for page in WITH_COMMANDS}
    assert names >= {"README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/performance.md"}
    assert len(examples.commands(README)) >= 6


def public() -> dict[str, Any]:
    """What users call, by its full name."""
    names = {f"spconv_triton.{name}": getattr(spconv_triton, name) for name in spconv_triton.__all__}
    names |= {f"spconv_triton.functional.{name}": getattr(functional, name) for name in functional.__all__}
    names |= {f"spconv_triton.models.{name}": getattr(models, name) for name in models.__all__}
    functions = inspect.getmembers(reference, inspect.isfunction)
    names |= {f"spconv_triton.reference.{name}": value for name, value in functions if not name.startswith("_")}
    return names


def test_every_public_name_has_an_entry() -> None:
    pages = {page.stem: page.read_text() for page in FOLDER.glob("api-*.md")}
    found: set[str] = set()
    for text in pages.values():
        found |= set(re.findall(r"^\.\. auto\w+:: (spconv_triton[\w.]+)", text, re.MULTILINE))
        for module, rest in re.findall(r"^\.\. automodule:: ([\w.]+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            names = re.findall(r"^\.\. auto\w+:: (\w+)$", rest, re.MULTILINE)
            names += [name for line in re.findall(r":members: (.*)", rest) for name in line.split(", ")]
            found |= {module, *(f"{module}.{name}" for name in names)}
    assert not sorted(set(public()) - found)


FUNCTIONS = {name: value for name, value in public().items() if inspect.isfunction(value)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_are_whole(name: str) -> None:
    """Every argument, the result, and what is raised; shapes where there are tensors."""
    function = FUNCTIONS[name]
    text = inspect.getdoc(function) or ""
    if ":func:`resnet20`" in text:  # its sisters, which say so
        return
    signature = inspect.signature(function)
    arguments = text.partition("Args:\n")[2].partition("\n\nReturns:")[0]
    missing = [
        p for p in signature.parameters if not re.search(rf"^ +(\w+, )*{p}(, \w+)*[:,]", arguments, re.MULTILINE)
    ]
    assert not missing, f"not in the Args of {name}"
    assert "Returns:\n" in text, name
    assert "Raises:\n" in text or function.__module__ == reference.__name__, name
    if "Tensor" in str(signature):
        assert re.search(r"\[[N2M], ?[A-Z]|\[N,", text), f"no shape in {name}"
        assert "float" in text, f"no dtype in {name}"


def test_the_figure_is_up_to_date(tmp_path: Path) -> None:
    figure.draw(tmp_path / "operator.svg")
    figure.draw(tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "operator.svg").read_bytes()
    drawn, committed = (words(file) for file in (tmp_path / "operator.svg", figure.PICTURE))
    assert {"x3", "U3", "U1", "Y", "statistics"} <= set(drawn)
    assert drawn == committed, "run python -m docs.figure"


def words(svg: Path) -> list[str]:
    return [text.strip() for element in ET.parse(svg).iter() if (text := element.text) and text.strip()]
