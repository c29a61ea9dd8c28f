"""A policy's log-probabilities of the data's held-out pairs (heldout_pairs.parquet)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from selm_jax.shell import artifacts
from selm_jax.tables.columns import Float32, Text, read_rows, schema_of, table_of


@dataclasses.dataclass(frozen=True)
class Row:
    """One answer of a held-out pair."""

    prompt_id: Text
    role: Text  # "chosen" or "rejected"
    logp: Float32  # of the data's answer under the policy
    logp_start: Float32  # and under the start model


SCHEMA = schema_of(Row)


def read(path: Path) -> list[Row]:
    return read_rows(path, Row)


def write(path: Path, rows: Sequence[Row]) -> None:
    artifacts.write_table(path, table_of(Row, rows))
