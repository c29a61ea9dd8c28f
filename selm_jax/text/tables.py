"""Reads rows from .jsonl, .json, .csv, .tsv (each also as .gz), .parquet and .arrow files.

The path may be one file, a folder with a file for each split, or a folder that
`Dataset.save_to_disk` wrote. Each row remembers its place, so that an error can name file, row and
line. A whole split is read into memory.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from selm_jax.shell import jsonl
from selm_jax.shell.bucket_files import copied, files_at
from selm_jax.shell.paths import cache_root
from selm_jax.shell.words import did_you_mean

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow")
_TEXTS = (".jsonl", ".json", ".csv", ".tsv")
# In the Hub's older files, the first digits of a digest follow the count.
_SHARD = re.compile(r"(?P<split>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]{16})?")


class DataError(ValueError):
    """A dataset cannot be used. The message names the file, row and column."""


class BadRow(Exception):
    """A row cannot be used; `load_prompts` then raises a DataError or counts the row."""

    def __init__(self, reason: str, column: str | None, detail: str):
        super().__init__(reason, column, detail)
        self.reason, self.column, self.detail = reason, column, detail


class Row(NamedTuple):
    """One row of a data file: its values by column, or the reason why it cannot be read."""

    file: str
    number: int  # counted from 1 in its file
    line: int | None  # the line where it begins, in a file of lines
    values: Mapping[str, Any] | BadRow

    @property
    def where(self) -> str:
        return f"{self.file}, row {self.number}" + (f" (line {self.line})" if self.line else "")


def read(path: epath.Path, split: str | None) -> Iterator[Row]:
    """Yields the rows of a file, or of one split of a folder, in order.

    Raises:
      DataError: if there is no such path or split, a file has an unknown suffix, a shard is
        missing, or a file cannot be read as what its suffix says.
    """
    if not path.exists():
        _raise_missing(path)
    if path.is_dir():
        files = _split_of(path, split)
    elif split is not None:
        raise DataError(
            f"{path} is a single file, so it has no split {split!r}. Remove the split, or give the "
            "folder that has a file for each split."
        )
    else:
        files = [path]
    for file in files:
        if (kind := kind_of(file.name)) is None:
            raise DataError(
                f"{file}: unknown file type. Use {', '.join(SUFFIXES)}; text files may also be "
                "compressed (.gz)."
            )
        yield from _READERS[kind](file)


def read_bucket(url: str, split: str | None) -> Iterator[Row]:
    """As `read`, for a file or folder in a bucket, through a copy in the cache.

    Raises:
      DataError: as `read`.
      StorageError: the bucket cannot be used.
    """
    store, files = files_at(url, lambda names: [name for name in names if kind_of(name)])
    if not files:
        raise DataError(
            f"{url}: there is no such data in the bucket. Give a {', '.join(SUFFIXES)} file, or a "
            "folder of them"
        )
    folder = copied(store, files, cache_root() / "data")
    at = folder if store.url == url.rstrip("/") else folder / next(iter(files))
    try:
        for row in read(epath.Path(at), split):
            yield row._replace(file=row.file.replace(str(folder), store.url))
    except DataError as e:
        raise DataError(str(e).replace(str(folder), store.url)) from e


def kind_of(name: str) -> str | None:
    """The suffix of a file name without `.gz`, such as `.jsonl`; None if it is not supported."""
    path = epath.Path(name)
    suffix = path.suffix
    if suffix == ".gz":
        suffix = epath.Path(path.stem).suffix
        return suffix if suffix in _TEXTS else None
    return suffix if suffix in SUFFIXES else None


def _raise_missing(path: epath.Path) -> NoReturn:
    parent = path.parent
    names = sorted(p.name for p in parent.iterdir()) if parent.is_dir() else []
    raise DataError(
        f"{path}: no such file or folder{did_you_mean(path.name, names)} Give a "
        f"{', '.join(SUFFIXES)} file, a folder of them, or a Hub dataset id written owner/name."
    )


def _split_of(folder: epath.Path, split: str | None) -> list[epath.Path]:
    """The files of one split, such as `train.parquet` or `train-00000-of-00002.parquet`, ..."""
    if (folder / _SAVED).exists():
        return _saved(folder, split)
    if (folder / "dataset_dict.json").exists():
        return _saved(_saved_split(folder, split), None)
    splits: dict[str, list[tuple[int, int, epath.Path]]] = {}
    for place in (folder, folder / "data"):  # Hub repositories keep their tables in data/
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            if kind := kind_of(file.name):
                stem = file.name.removesuffix(".gz").removesuffix(kind)
                shard = _SHARD.fullmatch(stem)
                name = shard["split"] if shard else stem
                index, count = (int(shard["index"]), int(shard["count"])) if shard else (0, 1)
                splits.setdefault(name, []).append((index, count, file))
    there = ", ".join(sorted(splits))
    if not splits:
        raise DataError(
            f"{folder}: no {', '.join(SUFFIXES)} file in this folder. Name another folder."
        )
    if split is None and len(splits) > 1:
        raise DataError(
            f"{folder} has several splits: {there}. Choose one with data.train_split or "
            "data.heldout_split."
        )
    name = next(iter(splits)) if split is None else split
    if name not in splits:
        hint = did_you_mean(name, splits)
        raise DataError(f"{folder}: no split {name!r}{hint} The splits are: {there}.")
    shards = sorted(splits[name])
    count = shards[0][1]
    if [(i, n) for i, n, _ in shards] != [(i, count) for i in range(count)]:
        found = ", ".join(file.name for *_, file in shards)
        raise DataError(
            f"{folder}: split {name!r} should be one file or a complete set of shards, but its "
            f"files are: {found}. Fetch the missing files, or remove those that are there twice."
        )
    return [file for *_, file in shards]


_SAVED = "state.json"  # `Dataset.save_to_disk` writes it beside its .arrow files


def _saved_split(folder: epath.Path, split: str | None) -> epath.Path:
    """The folder of one split in a folder that `DatasetDict.save_to_disk` wrote."""
    names = sorted(each.name for each in folder.iterdir() if (each / _SAVED).exists())
    if split is None and len(names) == 1:
        return folder / names[0]
    if split is None:
        there = ", ".join(names)
        raise DataError(
            f"{folder} has several splits: {there}. Choose one with data.train_split or "
            "data.heldout_split."
        )
    if split not in names:
        raise DataError(
            f"{folder}: no split {split!r}{did_you_mean(split, names)} The splits are: "
            f"{', '.join(names)}."
        )
    return folder / split


def _saved(folder: epath.Path, split: str | None) -> list[epath.Path]:
    """The data files in a folder that `Dataset.save_to_disk` wrote, in order."""
    state = folder / _SAVED
    try:
        told = jsonl.value(_text(state))
        names, own = (
            [epath.Path(each["filename"]).name for each in told["_data_files"]],
            told["_split"],
        )
    except (jsonl.JsonError, TypeError, KeyError) as error:
        raise DataError(
            f"{state}: not in the form that Dataset.save_to_disk writes ({type(error).__name__}: "
            f"{error}). Save the dataset again, or remove this file; then the folder's files are "
            "read by their names."
        ) from error
    if split not in (None, own):
        raise DataError(
            f"{folder} is a single saved dataset, so it has no split {split!r}. Remove the split."
        )
    if lost := [name for name in names if not (folder / name).exists()]:
        raise DataError(
            f"{folder}: {', '.join(lost)} is named in {_SAVED}, but missing. Fetch this file."
        )
    return [folder / name for name in names]


def _text(file: epath.Path) -> str:
    raw = file.read_bytes()
    if file.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{file}: cannot be unpacked: {error}. Download the file again."
            ) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line}: not UTF-8 text. Save the file as UTF-8.") from error


def _object(value: Any) -> Mapping[str, Any] | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow("not an object", None, f"found {type(value).__name__}, expected {{...}}.")


def _jsonl(file: epath.Path) -> Iterator[Row]:
    for number, line in enumerate(jsonl.lines(_text(file).encode()), start=1):
        try:
            values = _object(line.value())
        except jsonl.JsonError as error:
            values = BadRow("invalid JSON", None, f"{error}.")
        yield Row(str(file), number, line.number, values)


def _json(file: epath.Path) -> Iterator[Row]:
    try:
        rows = jsonl.value(_text(file))
    except jsonl.JsonError as error:
        hint = ""
        if str(error).startswith("Extra data"):
            hint = " If each line is an object of its own, name the file .jsonl."
        raise DataError(f"{file}: invalid JSON: {error}.{hint}") from error
    if not isinstance(rows, list):
        raise DataError(f"{file}: found {type(rows).__name__}, expected a list of objects.")
    for number, value in enumerate(rows, start=1):
        yield Row(str(file), number, None, _object(value))


def _csv(file: epath.Path, delimiter: str = ",") -> Iterator[Row]:
    text = _text(file)
    csv.field_size_limit(
        max(csv.field_size_limit(), len(text))
    )  # a cell may be as long as it likes
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(
                f"{file}, line 1: a column name occurs twice: {', '.join(header)}. "
                "Rename one of them."
            )
        number, line = 0, reader.line_num + 1
        for cells in reader:
            if cells:  # a blank line is not a row
                number += 1
                if len(cells) == len(header):
                    values = dict(zip(header, cells, strict=True))
                else:
                    detail = f"{len(cells)} cells under a header of {len(header)}."
                    values = BadRow("wrong number of cells", None, detail)
                yield Row(str(file), number, line, values)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: invalid CSV: {error}.") from error


def _arrow_table(handle: Any) -> pa.Table:
    """Reads a table in Arrow's stream format (as `datasets` writes) or file format (pyarrow)."""
    try:
        return pa.ipc.open_file(handle).read_all()
    except pa.ArrowInvalid:
        handle.seek(0)
        return pa.ipc.open_stream(handle).read_all()


def _columns(file: epath.Path, kind: str, table_of: Callable[[Any], pa.Table]) -> Iterator[Row]:
    """Yields the rows of a columnar file (Parquet or Arrow)."""
    number = 0
    try:
        with file.open("rb") as handle:
            batches = table_of(handle).to_batches()
        for batch in batches:
            for values in batch.to_pylist():
                number += 1
                yield Row(str(file), number, None, values)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file}: cannot be read as {kind}: {error}. Write the file again."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: a text after row {number} is not UTF-8 ({error}). Write the file again with "
            "texts in UTF-8."
        ) from error


_READERS: Mapping[str, Callable[[epath.Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": partial(_columns, kind="parquet", table_of=pq.read_table),
    ".arrow": partial(_columns, kind="arrow", table_of=_arrow_table),
}
