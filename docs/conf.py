"""Configuration of the documentation: one build, no network, tables taken from the code they describe."""

from __future__ import annotations

import importlib.metadata

import clora_core

project = "clora"
author = "The clora authors"
copyright = "the clora authors"
try:
    release = importlib.metadata.version("clora")
except importlib.metadata.PackageNotFoundError:  # built from a checkout that is not installed
    release = "unreleased"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"clora {release}"
nitpicky = False
default_role = "literal"  # docstrings set names in single backticks

myst_enable_extensions = ["amsmath", "dollarmath", "substitution"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # types are in the docstrings, in words
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_ivar = True
napoleon_use_rtype = False


def capability_table() -> str:
    """`clora_core.capabilities()` as a Markdown table."""
    rows = ["| function | `linalg` extension | runs under a compiler | derivatives by autodiff |", "|---|---|---|---|"]
    for name, capability in clora_core.capabilities().items():
        needs, jit = ("yes" if flag else "no" for flag in (capability.linalg, capability.jit))
        rows.append(f"| `{name}` | {needs} | {jit} | {capability.gradients} |")
    return "\n".join(rows)


myst_substitutions = {"capability_table": capability_table()}
