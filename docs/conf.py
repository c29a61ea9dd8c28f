"""The documentation site.

pip install -c constraints.txt -e '.[docs]'
sphinx-build -W --keep-going docs FOLDER
"""

from __future__ import annotations

import os
import re
from importlib.metadata import version as version_of
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
SOURCES = DOCS / "source"  # pages that are made here, one for each file that a page links to

project = "selm_jax"
author = "the authors of selm_jax"
version = release = version_of("selm_jax")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3  # a link may name a heading of another page
suppress_warnings = ["myst.header"]  # a page may begin below its title

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_preserve_defaults = True

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = "selm_jax"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]


def as_restructured_text(lines: list[str]) -> None:
    """Rewrites a docstring, in place, so that Sphinx reads what our docstrings mean.

    They write code in `single backticks`, and set formulas and drawings apart by an indented block.
    """
    found: list[str] = []
    literal = False
    for line in lines:
        indented = line.startswith(("  ", "\t"))
        if not line.strip():
            found.append(line)
            continue
        if indented and not literal and not (found and found[-1].strip()) and _is_prose(found):
            found += ["::", ""]
            literal = True
        elif not indented:
            literal = False
        found.append(line if literal else _marked(line))
    lines[:] = found


def _marked(line: str) -> str:
    """A line whose code is marked as Sphinx wants it, and whose bars are bars."""
    parts = re.split(r"(?<![`:])`([^`\n]+)`(?!`)", line)  # prose and code in turn
    marked = [f"``{p}``" if i % 2 else p.replace("|", r"\|") for i, p in enumerate(parts)]
    return re.sub(r"(?<=\S``)(?=\w)", r"\\ ", "".join(marked))  # as in `Trainer`s


def _is_prose(before: list[str]) -> bool:
    """Whether the last line with text is prose at the margin, not a section or an example."""
    last = next((line for line in reversed(before) if line.strip()), "")
    return bool(last) and not last.startswith((" ", ":", ">>>", ".. "))


_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def sources_linked_to() -> set[str]:
    """The files and folders outside docs/ that pages link to, as paths from the root."""
    pages = (file.read_text(encoding="utf-8") for file in DOCS.glob("*.md"))
    return {found[1].rstrip("/") for page in pages for found in _OUTSIDE.finditer(page)}


def write_sources() -> None:
    """Writes a page that shows each of those files, or lists the folder."""
    for name in sources_linked_to():
        path, page = ROOT / name, SOURCES / f"{name}.md"
        if path.is_file():
            up = os.path.relpath(path, page.parent)
            body = f"```{{literalinclude}} {up}\n:linenos:\n```"
        else:
            inside = sorted(
                p for p in path.rglob("*") if p.is_file() and "__pycache__" not in str(p)
            )
            body = "\n".join(f"- `{each.relative_to(path)}`" for each in inside)
        text = f"---\norphan: true\n---\n\n# `{name}`\n\n{body}\n"
        page.parent.mkdir(parents=True, exist_ok=True)
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def link_to_sources(name: str, content: list[str]) -> None:
    """Leads links out of docs/ to these pages. In the repository they lead to the files."""
    if not name.startswith("source/"):
        content[0] = _OUTSIDE.sub(lambda m: f"](source/{m[1].rstrip('/')}.md)", content[0])


def setup(app) -> None:
    app.connect("builder-inited", lambda app: write_sources())
    app.connect("source-read", lambda app, name, content: link_to_sources(name, content))
    app.connect(
        "autodoc-process-docstring",
        lambda app, what, name, obj, options, lines: as_restructured_text(lines),
        priority=900,  # after napoleon, which reads sections such as Args
    )
