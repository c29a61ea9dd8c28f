"""A policy's held-out answers, with scores and log-probabilities (heldout.parquet)."""

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
    """One held-out answer."""

    prompt_id: Text
    prompt: Text
    kind: Text  # "greedy" or "sample"
    sample: Int32
    text: Text
    token_ids: Ids
    finish: Text  # "stop" or "length"
    # The ranker's score, see `stages.evaluate`. NaN if people rank, or if a judge's answer about it
    # could not be read.
    score: Float64
    # Under the policy that wrote the answer; NaN if prompt and answer are too long for a row.
    logp: Float32
    logp_start: Float32  # and under the start model


SCHEMA = schema_of(Row)


def read(path: Path, token_ids: bool = True) -> list[Row]:
    """Reads the answers; without `token_ids`, every `Row.token_ids` is ()."""
    return read_rows(path, Row, token_ids)


def write(path: Path, rows: Sequence[Row]) -> None:
    artifacts.write_table(path, table_of(Row, rows))
