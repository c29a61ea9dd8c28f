"""Reads the files of benchmarks, and appends their results to files of JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.model import Model
from selm_jax.shell import jsonl

Row = Mapping[str, Any]
TOGETHER = 32  # answers that are drawn between two writes to the disk, if nobody gave the slots


class Journal:
    """A file of expensive results, one per JSON line, with lookup by key.

    Lines are only appended. A last line that a kill cut off is ignored, and the first `add` removes
    it. A complete last line counts, even without a line feed at its end.

    Attributes:
        rows: the results by key, in the order of the file.

    Raises:
        EvaluationError: a line is not an object or lacks its key, or a key appears twice.
    """

    def __init__(self, file: Path, key: Callable[[Mapping[str, Any]], Hashable]):
        self.file, self._key = file, key
        self.rows: dict[Any, dict[str, Any]] = {}
        self._whole: int | None = None  # bytes of whole lines, until they are the whole file
        if not file.exists():
            return
        raw = file.read_bytes()
        self._whole = len(raw)
        for line in jsonl.lines(raw):
            try:
                self._take(line.value())
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                if not line.ended and isinstance(error, jsonl.JsonError):
                    self._whole = len(raw) - len(line.raw)
                    break
                raise EvaluationError(
                    f"{file}, line {line.number}: {type(error).__name__}: {error}. The line "
                    "was changed, or another program wrote it. Delete this line, or choose another "
                    "folder."
                ) from error

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows to the file and flushes them to disk."""
        rows = [dict(row) for row in rows]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self._whole is not None:
            os.truncate(self.file, self._whole)
        with self.file.open("ab") as f:
            if self._whole and self.file.read_bytes()[-1:] != b"\n":
                f.write(b"\n")  # other programs may leave out the last line feed
            self._whole = None
            f.write(lines.encode("utf-8", "backslashreplace"))
            f.flush()
            os.fsync(f.fileno())
        for row in rows:
            self._take(row)

    def _take(self, row: dict[str, Any]) -> None:
        key = self._key(row)
        if key in self.rows:
            raise ValueError(f"{key!r} appears twice")
        self.rows[key] = row


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Reads a JSON list of objects, or a file with one object per line.

    Raises:
        EvaluationError: the file is neither, or is empty.
    """
    text = read_text(file)
    try:
        if text.lstrip().startswith("["):
            rows = jsonl.value(text)
        else:
            rows = [line.value() for line in jsonl.lines(text.encode())]
    except ValueError as error:
        raise EvaluationError(
            f"{file}: not JSON: {error}. Expected a list of objects, or one object per line."
        ) from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise EvaluationError(f"{file}: expected a list of objects, or one object per line.")
    return rows


def read_text(file: Path) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file} cannot be read: {error}.") from error


def text_of(row: Row, key: str, where: object, i: int) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        found = f"is {value!r:.60}" if key in row else "is missing"
        raise EvaluationError(f"{where}, row {i}: {key!r} {found}; expected a string.")
    return value


def pinned(model: Model) -> str:
    """A string that identifies a model's bytes, wherever they are stored."""
    origin = {key: value for key, value in model.folder.origin.items() if key != "source"}
    return json.dumps(origin, sort_keys=True)


def file_name(name: str) -> str:
    """A model's name as a file name: the slash of a Hub id is replaced."""
    return name.replace("/", "--")


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
