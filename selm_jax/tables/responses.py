"""The policy's answers to an iteration's prompts (responses/part-*.parquet)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from selm_jax.shell import parts
from selm_jax.tables.columns import Ids, Int32, Text, read_rows, schema_of, table_of


@dataclasses.dataclass(frozen=True)
class Row:
    """One answer of the policy."""

    prompt_id: Text
    sample: Int32  # 0 is the greedy one
    kind: Text  # "greedy" or "sample"
    token_ids: Ids
    text: Text
    finish: Text  # "stop" or "length"


SCHEMA = schema_of(Row)


def read(path: Path) -> list[Row]:
    """Reads the answers in one part of the table."""
    return read_rows(path, Row)


def write(path: Path, rows: Sequence[Row]) -> None:
    """Writes one part of the table, and a file with its SHA-256."""
    parts.write(path, table_of(Row, rows))


def files(folder: Path) -> list[Path]:
    """The Parquet files of a folder of answers, in the order of the prompts."""
    return sorted(folder.glob("part-*.parquet"))
