"""Every candidate of an iteration with its score, rank and role (ranked.parquet)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from selm_jax.shell import artifacts
from selm_jax.tables.columns import Bool, Float64, Ids, Int32, Text, read_rows, schema_of, table_of


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate."""

    prompt_id: Text
    prompt: Text  # its last message
    candidate: Int32  # its place among the prompt's candidates
    source: Text
    sample: Int32
    token_ids: Ids | None  # None where pairs become token ids, not candidates
    text: Text
    finish: Text
    score: Float64 = math.nan  # NaN if nobody was asked, or a judge said nothing readable of it
    rank: Int32 | None = None
    chosen: Bool = False
    rejected: Bool = False
    explore: Bool = False
    dropped: Text | None = None  # why the prompt gave no pair; None if it gave one
    preference: Float64 = math.nan  # of the chosen one: its soft label; NaN for the others


SCHEMA = schema_of(Row)


def read(path: Path, token_ids: bool = True) -> list[Row]:
    """The candidates; without `token_ids` theirs are (), whatever they are."""
    return read_rows(path, Row, token_ids)


def write(path: Path, rows: Sequence[Row]) -> None:
    artifacts.write_table(path, table_of(Row, rows))
