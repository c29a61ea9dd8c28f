"""A reward model's rewards of held-out pairs (pairs.parquet)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from selm_jax.shell import artifacts
from selm_jax.tables.columns import Float32, Text, read_rows, schema_of, table_of


@dataclasses.dataclass(frozen=True)
class Row:
    """One held-out pair with its rewards."""

    prompt_id: Text
    prompt: Text
    chosen: Text
    rejected: Text
    reward_chosen: Float32
    reward_rejected: Float32


SCHEMA = schema_of(Row)


def read(path: Path) -> list[Row]:
    return read_rows(path, Row)


def write(path: Path, rows: Sequence[Row]) -> None:
    artifacts.write_table(path, table_of(Row, rows))
