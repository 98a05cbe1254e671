"""Sphinx's settings. ``make docs`` builds the site in docs/_build/html."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parents[1]))

import spconv_triton
from docs import tables

project = "spconv_triton"
author = "The spconv_triton authors"
copyright = author
version = release = spconv_triton.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_tables"]
myst_heading_anchors = 3

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Shape"]
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"spconv_triton {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_copyright = False


SHARED = re.compile(r"(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*)")


LETTER = re.compile(r"(: )([A-Z]\.)$")
"""``L.`` alone, which would begin a list."""


def split_attributes(lines: list[str]) -> list[str]:
    """Attributes that share a line, ``a, b: text``, on lines of their own, as napoleon does it for arguments."""
    result: list[str] = []
    heading = pending = ""
    names: list[str] = []
    for line in [*lines, ""]:
        indent = len(line) - len(line.lstrip())
        if pending and indent > len(pending):
            result[-1] += " " + line.strip()
            continue
        if pending:
            entry = result.pop()
            result += [f"{pending}{name}: {entry}" for name in names]
            pending = ""
        if line and not indent:
            heading = line
        match = SHARED.fullmatch(line) if heading == "Attributes:" else None
        if match:
            pending, names = match["indent"], match["names"].split(", ")
            result.append(match["text"])
        else:
            result.append(line)
    return result


def process_docstring(
    _app: Sphinx, _what: str, _name: str, _subject: object, _options: object, lines: list[str]
) -> None:
    """What autodoc calls with every docstring, to be changed in place."""
    lines[:] = [LETTER.sub(r"\1\\\2", line) for line in split_attributes(lines)]


def setup(app: Sphinx) -> None:
    """Compute the tables before anything is read, and see docstrings before napoleon does."""
    app.connect("autodoc-process-docstring", process_docstring, priority=100)
    app.connect("builder-inited", lambda _app: tables.write(Path(__file__).with_name("_tables")))
