"""How Sphinx builds this site: `sphinx-build -W --keep-going docs docs/_build`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.ext import autodoc
from sphinx.writers.html5 import HTML5Translator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # docstrings are read, nothing is computed

project = "BlackMamba-JAX"
author = "the authors of BlackMamba-JAX"
copyright = f"{author}. Apache-2.0"
release = version = importlib.metadata.version("blackmamba-jax")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["math.css"]
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

# Docstrings put code in single backticks; where it is the name of something documented here, it becomes a link.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100


def inline_math(translator: HTML5Translator, node: nodes.math) -> None:
    """A formula in a line, as MathML."""
    translator.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def block_math(translator: HTML5Translator, node: nodes.math_block) -> None:
    """A formula by itself, as MathML."""
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>\n')
    raise nodes.SkipNode


def plain_docstring(app: Sphinx, what: str, name: str, member: object, options: object, lines: list[str]) -> None:
    """Docstrings as they are written here, for readers of the source, in what Sphinx and napoleon expect.

    An indented part after a colon and an empty line is code. What describes a field is text from its first word on, where
    napoleon would take the words before a colon for a type.
    """
    for number in range(len(lines) - 2):
        here, between, after = lines[number : number + 3]
        indented = len(after) - len(after.lstrip()) > len(here) - len(here.lstrip())
        if here.endswith(":") and not here.endswith("::") and not between.strip() and indented:
            lines[number] = f"{here}:"
    if what in ("attribute", "property") and lines:
        lines[0] = f": {lines[0]}"
        if lines[0].startswith(": Alias for field number"):  # Python's own, which says nothing
            lines.clear()


def plain_signature(
    app: Sphinx, what: str, name: str, member: object, options: object, signature: str, returned: str
) -> tuple[str, str] | None:
    """The fields of a dataclass are listed below it, each with its default: its signature would say all of it again."""
    return ("", returned) if what == "class" and dataclasses.is_dataclass(member) else None


def described(value: object) -> str:
    """A default as a page shows it: a configuration by its name, as its own fields are listed elsewhere."""
    kind = type(value)
    return f"{kind.__name__}()" if dataclasses.is_dataclass(kind) and value == kind() else object_description(value)


object_description = autodoc.object_description
autodoc.object_description = described


def setup(app: Sphinx) -> None:
    """Formulas are MathML, which browsers draw by themselves: the site loads nothing from elsewhere."""
    app.add_html_math_renderer("mathml", inline_renderers=(inline_math, None), block_renderers=(block_math, None))
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", plain_signature)
