"""The page of file formats has every table and every column, and its examples run."""

import importlib
import pkgutil
import re
from pathlib import Path

import pyarrow as pa
import pytest

from selm_jax import tables
from selm_jax.tables.columns import schema_of

PAGE = (Path(__file__).parents[2] / "docs" / "files.md").read_text(encoding="utf-8")
TABLES = {
    module.name: importlib.import_module(f"{tables.__name__}.{module.name}")
    for module in pkgutil.iter_modules(tables.__path__)
    if module.name != "columns"
}


def said(name):
    """The columns of a table as the page lists them: [(name, type), ...]."""
    section = re.search(rf"^## {name}\n(.*?)(?=^## )", PAGE, re.MULTILINE | re.DOTALL)
    assert section, f"docs/files.md has no section '## {name}'"
    return re.findall(r"^\| `(\w+)` \| (\S+(?: \S+)*?) \|", section[1], re.MULTILINE)


def written(kind):
    """A pyarrow type as the page writes it."""
    return f"list<{written(kind.value_type)}>" if pa.types.is_list(kind) else str(kind)


@pytest.mark.parametrize("name", TABLES)
def test_every_column_is_on_the_page_with_its_type(name):
    schema = schema_of(TABLES[name].Row)
    assert [(c, kind.removesuffix("?")) for c, kind in said(name)] == [
        (field.name, written(field.type)) for field in schema
    ]


@pytest.mark.parametrize("name", TABLES)
def test_the_page_says_which_columns_may_be_null(name):
    hints = TABLES[name].Row.__annotations__
    for column, kind in said(name):
        assert kind.endswith("?") == ("None" in str(hints[column])), column


def test_the_page_has_no_table_that_is_not_written():
    sections = re.findall(r"^## (\w+)$", PAGE, re.MULTILINE)
    assert set(TABLES) <= set(sections)
