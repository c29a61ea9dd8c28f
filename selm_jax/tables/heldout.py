"""Held-out answers of a policy, with all that is known of them (heldout.parquet)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from selm_jax.shell import artifacts
from selm_jax.tables.columns import (
    Float32,
    Float64,
    Ids,
    Int32,
    Text,
    read_rows,
    schema_of,
    table_of,
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One answer."""

    prompt_id: Text
    prompt: Text
    kind: Text  # "greedy" or "sample"
    sample: Int32
    text: Text
    token_ids: Ids
    finish: Text  # "stop" or "length"
    # Of the ranker, see `stages.evaluate`; NaN if it is people, or a judge that said nothing readable
    # of this answer.
    score: Float64
    # Of the answer under the policy that gave it; NaN if it and its prompt are too long for a row.
    logp: Float32
    logp_start: Float32  # and under the start model


SCHEMA = schema_of(Row)


def read(path: Path, token_ids: bool = True) -> list[Row]:
    """The answers; without `token_ids` theirs are ()."""
    return read_rows(path, Row, token_ids)


def write(path: Path, rows: Sequence[Row]) -> None:
    artifacts.write_table(path, table_of(Row, rows))
