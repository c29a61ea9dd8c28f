"""The first cell of a notebook installs the package, or says what to do where it cannot."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ADDRESS = PROJECT.get("urls", {}).get("Repository", "")
"""The one place that says where the repository is. It is not there before it is published."""


def first_cell(name: str) -> str:
    cells = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4).cells
    return next(cell.source for cell in cells if cell.cell_type == "code")


@pytest.fixture(params=["quickstart", "own_loss"])
def run_cell(request, monkeypatch, tmp_path):
    """Runs a first cell where selm_jax is missing; the lines that it gives to pip."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    def run(repository: str) -> list[str]:
        given, names = [], {}

        class Shell:
            def run_line_magic(self, magic, line):
                assert magic == "pip"
                given.append(line.format_map(names))

        names["get_ipython"] = Shell
        cell = re.sub(
            r'REPOSITORY = "[^"]*"', f'REPOSITORY = "{repository}"', first_cell(request.param)
        )
        exec(TransformerManager().transform_cell(cell), names)  # noqa: S102 (a cell of our own)
        return given

    return run


def test_it_installs_from_the_address(run_cell):
    (line,) = run_cell("https://example.org/me/selm_jax")
    assert re.fullmatch(
        r'install --quiet "selm_jax(\[\w+\])? @ git\+https://example.org/me/selm_jax"', line
    )


def test_without_an_address_it_installs_the_uploaded_zip(run_cell, tmp_path):
    (tmp_path / "selm_jax-main.zip").touch()
    (line,) = run_cell("")
    assert line.endswith(f' @ {(tmp_path / "selm_jax-main.zip").as_uri()}"')


def test_without_either_it_says_what_to_do(run_cell):
    with pytest.raises(RuntimeError, match="REPOSITORY, or upload the repository as selm_jax.zip"):
        run_cell("")


@pytest.mark.parametrize("name", ["quickstart", "own_loss"])
def test_a_notebook_has_the_address_of_the_project(name):
    assert f'REPOSITORY = "{ADDRESS}"' in first_cell(name)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_a_page_clones_from_the_address_of_the_project(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert f"git clone {ADDRESS or '<this repository>'} && cd selm_jax" in text


def test_the_citation_has_the_address_of_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.get("repository-code", "") == ADDRESS
