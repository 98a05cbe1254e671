"""The documentation says what is so: its examples run and print what it shows, and no public name is left out."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import re
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import spconv_triton
from docs import examples, figure
from docs.examples import FOLDER
from spconv_triton import functional, models, reference
from spconv_triton.training.cli import make_parser

ROOT = FOLDER.parent

PAGES = [*examples.pages(), ROOT / "README.md"]

EXACT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("page", examples.pages(), ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore:No complete tensor found in the group:UserWarning")  # torch.export.load's
def test_examples_print_what_the_page_shows(page: Path) -> None:
    for example, printed in examples.run(page):
        right = doctest.OutputChecker().check_output(f"{example.output}\n", f"{printed}\n", EXACT)
        assert right, f"{page.name}:{example.line} prints\n{printed}\ninstead of\n{example.output}"


def test_every_page_with_python_is_run() -> None:
    """Blocks that the pattern of ``examples`` misses would be shown and never run."""
    counts = {page.name: len(examples.examples(page)) for page in examples.pages()}
    assert counts == {page.name: page.read_text().count("```py") for page in examples.pages()}
    assert sum(counts.values()) > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in examples.commands(page):
        words = shlex.split(command)
        if words[0] == "make":
            assert set(words[1:2]) <= targets, command
        elif "spconv_triton" in words:
            make_parser().parse_args(words[words.index("spconv_triton") + 1 :])
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), command
        else:
            assert words[:2] == ["pip", "install"], command


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
