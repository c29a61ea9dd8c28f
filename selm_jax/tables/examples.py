"""The training examples of an iteration, with the reference's log-probabilities.

File: examples.parquet.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq

from selm_jax.objectives.roles import ROLES
from selm_jax.preferences.examples import Example
from selm_jax.shell import artifacts
from selm_jax.tables.columns import ADDED, Float64, Ids, Int32, Text, read_rows, schema_of, table_of

_OfIds = Annotated[tuple[tuple[int, ...], ...], pa.list_(pa.list_(pa.int32()))]
_OfTokens = Annotated[tuple[tuple[float, ...], ...], pa.list_(pa.list_(pa.float32()))]
_OfResponses = Annotated[tuple[float, ...], pa.list_(pa.float32())]


@dataclasses.dataclass(frozen=True)
class Row:
    """An `Example` as a row; the column of a role has the index of its response, or None."""

    prompt_id: Text
    prompt: Ids
    responses: _OfIds
    chosen: Int32 | None
    rejected: Int32 | None
    explore: Int32 | None
    reference: _OfResponses | None
    scores: _OfResponses | None
    explored: Ids | None
    # The importance weight of each token of each response; null if all tokens count the same.
    importance: _OfTokens | None = dataclasses.field(default=None, metadata=ADDED)
    # Like `reference`, of the tokens within the length of the pair's shorter answer.
    shared: _OfResponses | None = dataclasses.field(default=None, metadata=ADDED)
    # The count bonus of the data; null if the data has none.
    bonus: Float64 | None = dataclasses.field(default=None, metadata=ADDED)


SCHEMA = schema_of(Row)
_REFERENCE = "digest of the reference"
# Earlier versions stored another digest, called "reference": that of the policy from which the
# iteration starts. With `reference_policy: start` this is a different model.
_START = "reference"


def read(path: Path) -> list[Example]:
    return [
        Example(
            row.prompt_id, row.prompt, row.responses,
            {role: at for role in ROLES if (at := getattr(row, role)) is not None},
            row.reference, row.scores, row.explored or (), row.importance,
            _number(row.bonus), row.shared,
        )
        for row in read_rows(path, Row)
    ]  # fmt: skip


def write(path: Path, examples: Sequence[Example], reference: str = "") -> None:
    """Writes the training examples to a Parquet file.

    Args:
      path: the file.
      examples: the examples.
      reference: the digest of the model that gave the log-probabilities; see `reference_digest`.
    """
    rows = [
        Row(
            e.prompt_id, e.prompt, e.responses,
            e.roles.get("chosen"), e.roles.get("rejected"), e.roles.get("explore"),
            e.reference_logps, e.scores, e.explored, e.importance, e.shared_logps, e.bonus,
        )
        for e in examples
    ]  # fmt: skip
    artifacts.write_table(path, table_of(Row, rows, {_REFERENCE: reference}))


def _number(value: float | None) -> float | None:
    """The number of a cell, or None if the cell is empty, which reads as NaN."""
    return None if value is None or math.isnan(value) else value


def reference_digest(path: Path) -> str:
    """The digest of the model that computed a file's log-probabilities; "" if unknown."""
    return _told(path, _REFERENCE)


def start_digest(path: Path) -> str:
    """The digest of the policy that the iteration started from; "" if the file has none.

    Only earlier versions wrote it.
    """
    return _told(path, _START)


def _told(path: Path, key: str) -> str:
    return (pq.read_schema(path).metadata or {}).get(key.encode(), b"").decode()
