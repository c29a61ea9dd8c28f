"""Rows that took tokens or money, on disk as they come: one JSON line each, found again by key."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

from selm_jax.evaluation import EvaluationError


class Journal:
    """A file that only grows, by whole lines. A line torn by a kill is not read, and is taken away
    by the first `add`.

    Attributes:
        rows: by key, in the order of the file.

    Raises:
        EvaluationError: a line that is no object or lacks its key, or a key that is there twice.
    """

    def __init__(self, file: Path, key: Callable[[Mapping[str, Any]], Hashable]):
        self.file, self._key = file, key
        self.rows: dict[Any, dict[str, Any]] = {}
        self._whole: int | None = None  # bytes of whole lines, until they are the whole file
        if not file.exists():
            return
        raw = file.read_bytes()
        whole = raw.rpartition(b"\n")[0] + b"\n" if b"\n" in raw else b""
        self._whole = len(whole)
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                self._take(json.loads(line))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise EvaluationError(
                    f"{file}, line {number}: {type(error).__name__}: {error}. It was not written "
                    "here, or was changed since; take the line away, or name another folder."
                ) from error

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows; they are on the disk when this returns."""
        rows = [dict(row) for row in rows]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self._whole is not None:
            os.truncate(self.file, self._whole)
            self._whole = None
        with self.file.open("ab") as f:
            f.write(lines.encode("utf-8", "backslashreplace"))
            f.flush()
            os.fsync(f.fileno())
        for row in rows:
            self._take(row)

    def _take(self, row: dict[str, Any]) -> None:
        key = self._key(row)
        if key in self.rows:
            raise ValueError(f"{key!r} is there twice")
        self.rows[key] = row
