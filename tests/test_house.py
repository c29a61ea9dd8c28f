"""Limits that keep the package readable. An exception that is no longer one fails: take it away."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "selm_jax"
LINES_OF_FUNCTION = 80  # signature and docstring included
LINES_OF_FILE = 400
MEMBERS = 25  # methods and attributes of a class

LONG_FUNCTIONS: set[str] = set()
LONG_FILES: set[str] = set()
LARGE_CLASSES: set[str] = set()
RECORDS = ("tables/", "config/", "models/config.py")  # classes that are one field after another

Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def sources() -> Iterator[tuple[str, str]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        yield file.relative_to(PACKAGE).as_posix(), file.read_text()


def definitions(kinds: type | tuple[type, ...]) -> Iterator[tuple[str, Node]]:
    for name, text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, kinds):
                yield f"{name}:{node.name}", node


def members(node: ast.ClassDef) -> int:
    """Methods and class-level attributes; a nested class is one, too."""
    return sum(
        len(each.targets)
        if isinstance(each, ast.Assign)
        else isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.AnnAssign)
        for each in node.body
    )


def test_functions_fit_on_a_screen():
    functions = definitions((ast.FunctionDef, ast.AsyncFunctionDef))
    long = {
        name for name, node in functions if node.end_lineno - node.lineno + 1 > LINES_OF_FUNCTION
    }
    assert long == LONG_FUNCTIONS


def test_files_are_short():
    assert {name for name, text in sources() if text.count("\n") > LINES_OF_FILE} == LONG_FILES


def test_classes_are_small():
    large = {
        name
        for name, node in definitions(ast.ClassDef)
        if members(node) > MEMBERS and not name.startswith(RECORDS)
    }
    assert large == LARGE_CLASSES


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("class A:\n  '''Says.'''", 0),
        ("class A:\n  a: int\n  b = c = 1\n  def d(self): ...\n  async def e(self): ...", 5),
        ("class A:\n  class B:\n    a: int\n    b: int", 1),
    ],
)
def test_members_are_counted(text, count):
    assert members(ast.parse(text).body[0]) == count


SCRIPTS = sorted(
    file
    for folder in ("benchmarks", "docs", "experiments", "examples")
    for file in (PACKAGE.parent / folder).rglob("*.py")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_scripts_beside_the_package_import_what_is_there(script):
    """Nothing runs them here, and what they measure takes minutes."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("selm_jax"):
            module = importlib.import_module(node.module)
            for name in (each.name for each in node.names):
                if not hasattr(module, name):
                    importlib.import_module(f"{node.module}.{name}")
