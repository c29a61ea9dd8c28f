"""The ranker's scores of an iteration's candidates, in parts (scores/part-*.parquet)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from selm_jax.shell import parts
from selm_jax.tables.columns import Numbers, Text, read_rows, schema_of, table_of

_ABOUT = "selm"


@dataclasses.dataclass(frozen=True)
class Row:
    """The scores of a prompt's candidates, in order; NaN if a judge's answer was not readable."""

    prompt_id: Text
    scores: Numbers


SCHEMA = schema_of(Row)


def read(path: Path) -> list[Row]:
    return read_rows(path, Row)


def about(path: Path) -> str:
    """The text `about` that `write` stored with the scores; "" if the file has none."""
    return (pq.read_schema(path).metadata or {}).get(_ABOUT.encode(), b"").decode()


def write(path: Path, rows: Sequence[Row], about: str) -> None:
    """Writes one part of the table, and a file with its SHA-256.

    Args:
      path: the file.
      rows: the scores.
      about: identifies what was scored; read it with the function `about`.
    """
    parts.write(path, table_of(Row, rows, {_ABOUT: about}))
