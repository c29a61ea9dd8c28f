"""What a ranker has said of an iteration's candidates, part by part (scores/part-*.parquet)."""

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
    """The scores of a prompt's candidates, in their order; NaN where a judge was not readable."""

    prompt_id: Text
    scores: Numbers


SCHEMA = schema_of(Row)


def read(path: Path) -> list[Row]:
    return read_rows(path, Row)


def about(path: Path) -> str:
    """What was written with the scores; "" if nothing was."""
    return (pq.read_schema(path).metadata or {}).get(_ABOUT.encode(), b"").decode()


def write(path: Path, rows: Sequence[Row], about: str) -> None:
    """Writes one part, and its SHA-256 beside it.

    Args:
      about: what the scores are of, for who finds them; see `about`.
    """
    parts.write(path, table_of(Row, rows, {_ABOUT: about}))
