"""What an iteration is trained on, with the reference's log-probabilities (examples.parquet)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq

from selm_jax.preferences.examples import ROLES, Example
from selm_jax.shell import artifacts
from selm_jax.tables.columns import Ids, Int32, Text, read_rows, schema_of, table_of

_OfIds = Annotated[tuple[tuple[int, ...], ...], pa.list_(pa.list_(pa.int32()))]
_OfResponses = Annotated[tuple[float, ...], pa.list_(pa.float32())]


@dataclasses.dataclass(frozen=True)
class Row:
    """An `Example`, each role in a column: the place of its response, None if nobody plays it."""

    prompt_id: Text
    prompt: Ids
    responses: _OfIds
    chosen: Int32 | None
    rejected: Int32 | None
    explore: Int32 | None
    reference: _OfResponses | None
    scores: _OfResponses | None
    explored: Ids | None


SCHEMA = schema_of(Row)
_REFERENCE = "digest of the reference"
# What files of before had in its place, called "reference": the digest of the policy that the
# iteration starts from, which is another model under `reference_policy: start`.
_START = "reference"


def read(path: Path) -> list[Example]:
    return [
        Example(
            row.prompt_id, row.prompt, row.responses,
            {role: at for role in ROLES if (at := getattr(row, role)) is not None},
            row.reference, row.scores, row.explored or (),
        )
        for row in read_rows(path, Row)
    ]  # fmt: skip


def write(path: Path, examples: Sequence[Example], reference: str = "") -> None:
    """
    Args:
      reference: the digest of the model that the log-probabilities are of; see `reference_of`.
    """
    rows = [
        Row(
            e.prompt_id, e.prompt, e.responses,
            e.roles.get("chosen"), e.roles.get("rejected"), e.roles.get("explore"),
            e.reference, e.scores, e.explored,
        )
        for e in examples
    ]  # fmt: skip
    artifacts.write_table(path, table_of(Row, rows, {_REFERENCE: reference}))


def reference_of(path: Path) -> str:
    """The digest of the model whose log-probabilities stand in a file of examples; "" if unknown."""
    return _told(path, _REFERENCE)


def start_of(path: Path) -> str:
    """The digest of the policy that the iteration started from; "" but in files of before."""
    return _told(path, _START)


def _told(path: Path, key: str) -> str:
    return (pq.read_schema(path).metadata or {}).get(key.encode(), b"").decode()
