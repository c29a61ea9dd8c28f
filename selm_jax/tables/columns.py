"""Defines tables from dataclasses: the annotation of a field gives the type of its column.

@dataclasses.dataclass(frozen=True)
class Row:
    prompt_id: Text
    score: Float64  # NaN in a row is null in the file
    rank: Int32 | None
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import pyarrow as pa
import pyarrow.compute as pc

from selm_jax.shell import artifacts
from selm_jax.shell.words import redo

Text = Annotated[str, pa.string()]
Int32 = Annotated[int, pa.int32()]
Bool = Annotated[bool, pa.bool_()]
# NaN stands for an unknown number. In the file it is null, also within a list.
Float32 = Annotated[float, pa.float32()]
Float64 = Annotated[float, pa.float64()]
Numbers = Annotated[tuple[float, ...], pa.list_(pa.float64())]
Logps = Annotated[tuple[float, ...], pa.list_(pa.float32())]  # in nats, one per token
_TOKEN_IDS = pa.list_(pa.int32())
Ids = Annotated[tuple[int, ...], _TOKEN_IDS]

Row = TypeVar("Row")

# Metadata of a field with a default, whose column older tables do not have.
ADDED: Mapping[str, bool] = {"added": True}


def schema_of(row: type) -> pa.Schema:
    """The schema of a dataclass's table: one column per field, in the same order."""
    return pa.schema([(field.name, field.type) for field in _fields(row)])


def _fields(row: type) -> list[pa.Field]:
    """The columns as Arrow fields, nullable where the dataclass allows None or NaN."""
    fields = []
    for name, hint in typing.get_type_hints(row, include_extras=True).items():
        either = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
        column = either[0].__metadata__[0]
        fields.append(pa.field(name, column, len(either) > 1 or pa.types.is_floating(column)))
    return fields


def table_of(
    row: type[Row], rows: Sequence[Row], metadata: Mapping[str, str] | None = None
) -> pa.Table:
    """Makes a table from rows, with optional `metadata` in its schema."""
    schema = schema_of(row)
    if metadata:
        schema = schema.with_metadata(metadata)
    columns = [
        pa.array([getattr(each, name) for each in rows], column, from_pandas=True)
        for name, column in zip(schema.names, schema.types, strict=True)
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def read_rows(path: Path, row: type[Row], token_ids: bool = True) -> list[Row]:
    """Reads the rows of a table from a file; additional columns are ignored.

    Columns that older tables do not have (`ADDED`) may be missing; their rows have None there.

    Args:
      path: a parquet file.
      row: the dataclass of the table.
      token_ids: whether to read token ids. Otherwise they are (), which is much faster.

    Raises:
      FileNotFoundError: if there is no such file.
      ArtifactError: if the file is damaged or contains a different table.
    """
    table, schema = artifacts.read_table(path), schema_of(row)
    lacking = [field for field in schema if field.name not in table.column_names]
    later = {f.name for f in dataclasses.fields(cast(Any, row)) if f.metadata.get("added")}
    if missing := [field.name for field in lacking if field.name not in later]:
        found = ", ".join(table.column_names)
        raise _another(f"{path} has no column {', '.join(missing)}; it has {found}", path)
    for field in lacking:
        table = table.append_column(field, pa.nulls(len(table), field.type))
    try:
        table = table.select(schema.names).cast(schema)
    except pa.ArrowException as error:
        raise _another(f"{path} has a column of the wrong type ({error})", path) from error
    columns = []
    for field, column in zip(_fields(row), table.columns, strict=True):
        if column.null_count and not field.nullable:
            at = pc.index(pc.is_null(column), True).as_py()
            raise _another(f"{path}, row {at}: {field.name} is empty; expected a value", path)
        skipped = field.type == _TOKEN_IDS and not token_ids
        columns.append([()] * len(table) if skipped else _values(field.type, column.to_pylist()))
    return [row(*values) for values in zip(*columns, strict=True)]


def _values(column: pa.DataType, values: list[Any]) -> list[Any]:
    """Converts the values of a column from Arrow to those in rows (tuples, NaN)."""
    if pa.types.is_list(column):
        return [None if x is None else tuple(_values(column.value_type, x)) for x in values]
    if pa.types.is_floating(column):
        return [math.nan if x is None else x for x in values]
    return values


def _another(what: str, path: Path) -> artifacts.ArtifactError:
    return artifacts.ArtifactError(
        f"{what}. Restore the table from a copy, or run the stage that wrote it again: "
        f"{redo(path.parent, 'STAGE')}"
    )
