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
    """One candidate of a prompt."""

    prompt_id: Text
    prompt: Text  # its last message
    candidate: Int32  # index among the prompt's candidates
    source: Text
    sample: Int32
    token_ids: Ids | None  # None if only pairs, not all candidates, are tokenised
    text: Text
    finish: Text
    score: Float64 = math.nan  # NaN if nobody was asked, or the judge's answer was not readable
    rank: Int32 | None = None
    chosen: Bool = False
    rejected: Bool = False
    explore: Bool = False
    dropped: Text | None = None  # why the prompt gave no pair; None if it gave one
    preference: Float64 = math.nan  # the soft label, in the row of the chosen one; NaN in others


SCHEMA = schema_of(Row)


def read(path: Path, token_ids: bool = True) -> list[Row]:
    """Reads the candidates; without `token_ids`, every `Row.token_ids` is ()."""
    return read_rows(path, Row, token_ids)


def write(path: Path, rows: Sequence[Row]) -> None:
    artifacts.write_table(path, table_of(Row, rows))
