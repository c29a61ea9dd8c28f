"""A policy's scores in the lm-eval tasks of the capability guard (tasks.parquet)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from selm_jax.shell import artifacts
from selm_jax.tables.columns import Bool, Float64, Int32, Text, read_rows, schema_of, table_of


@dataclasses.dataclass(frozen=True)
class Row:
    """The score of one question, or of a whole task where its measure is no mean of questions."""

    task: Text
    measure: Text  # such as "acc", or "exact_match,strict-match" with the name of lm-eval's filter
    question: Int32 | None  # the row of the task's data, from 0; None for a whole task
    prompt: Text  # digest of the row, what was asked and the right answer; "" for a whole task
    value: Float64
    higher_is_better: Bool | None  # None if the task does not say


SCHEMA = schema_of(Row)


def read(path: Path) -> list[Row]:
    return read_rows(path, Row)


def write(path: Path, rows: Sequence[Row]) -> None:
    artifacts.write_table(path, table_of(Row, rows))
