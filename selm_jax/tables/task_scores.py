"""A policy's scores in the lm-eval tasks of the capability guard (tasks.parquet)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from selm_jax.shell import artifacts
from selm_jax.tables.columns import (
    ADDED,
    Bool,
    Float64,
    Int32,
    Text,
    read_rows,
    schema_of,
    table_of,
)


@dataclasses.dataclass(frozen=True)
class Row:
    """The score of one question, or of a group, or of a task whose measure has no parts."""

    task: Text  # or the group's name, in the row of its aggregate
    measure: Text  # such as "acc", or "exact_match,strict-match" with the name of lm-eval's filter
    question: Int32 | None  # the row of the task's data, from 0; None for a whole task or group
    prompt: Text  # digest of the row, what was asked and the right answer; "" for a whole task
    value: Float64  # the mean over a task's questions is its score, also where it is a perplexity
    higher_is_better: Bool | None  # None if the task does not say
    group: Text | None = dataclasses.field(default=None, metadata=ADDED)  # that was asked for
    # The weight of the task in its group's aggregate; None if there is none of this measure.
    share: Float64 | None = dataclasses.field(default=None, metadata=ADDED)
    # lm-eval's, of a group.
    stderr: Float64 | None = dataclasses.field(default=None, metadata=ADDED)


SCHEMA = schema_of(Row)


def read(path: Path) -> list[Row]:
    return read_rows(path, Row)


def write(path: Path, rows: Sequence[Row]) -> None:
    artifacts.write_table(path, table_of(Row, rows))
