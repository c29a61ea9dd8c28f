"""The policy's answers to an iteration's prompts (responses/part-*.parquet)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from selm_jax.shell import parts
from selm_jax.tables.columns import ADDED, Ids, Int32, Logps, Text, read_rows, schema_of, table_of

_SAMPLING = "sampling"


@dataclasses.dataclass(frozen=True)
class Row:
    """One answer of the policy."""

    prompt_id: Text
    sample: Int32  # 0 is the greedy one
    kind: Text  # "greedy" or "sample"
    token_ids: Ids
    text: Text
    finish: Text  # "stop" or "length"
    # The log-probability of each token under the policy at temperature 1 and without filters, as
    # the sampler computed it; null if it did not say.
    logps: Logps | None = dataclasses.field(default=None, metadata=ADDED)
    # The same under the distribution that the tokens were drawn from, with the temperature and the
    # filters in the file's metadata; null for a greedy answer, whose tokens are not drawn.
    sampled_logps: Logps | None = dataclasses.field(default=None, metadata=ADDED)


SCHEMA = schema_of(Row)


def read(path: Path) -> list[Row]:
    """Reads the answers in one part of the table."""
    return read_rows(path, Row)


def write(path: Path, rows: Sequence[Row], sampling: Mapping[str, Any] | None = None) -> None:
    """Writes one part of the table, and a file with its SHA-256.

    Args:
      path: the file.
      rows: the answers.
      sampling: the temperature and the filters that the samples were drawn with.
    """
    metadata = None if sampling is None else {_SAMPLING: json.dumps(dict(sampling))}
    parts.write(path, table_of(Row, rows, metadata))


def sampling_of(path: Path) -> dict[str, Any]:
    """The settings that `write` stored with the answers; {} if the file has none."""
    return json.loads((pq.read_schema(path).metadata or {}).get(_SAMPLING.encode(), b"{}"))


def has_logps(folder: Path) -> bool:
    """Returns whether any answer in a folder of answers has the log-probabilities of its tokens."""
    for file in files(folder):
        if "logps" in pq.read_schema(file).names:
            column = pq.read_table(file, columns=["logps"])["logps"]
            if column.null_count < len(column):
                return True
    return False


def files(folder: Path) -> list[Path]:
    """The Parquet files of a folder of answers, in the order of the prompts."""
    return sorted(folder.glob("part-*.parquet"))
