"""A cache of paid answers on disk, in an SQLite file that a killed process cannot damage.

The key of an answer is the SHA-256 of its whole request. Answers are on disk before they are used,
so that a run can be repeated without paying again.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from selm_jax.feedback.ranker import FeedbackError
from selm_jax.shell.paths import make_private

_VERSION = 1  # of the table and of the way the key is made


def request_key(body: Mapping[str, Any], draw: int = 0) -> str:
    """SHA-256 of a request (model name, messages, sampling settings), in hex.

    Args:
        body: the JSON body of the request. The order of its keys does not matter.
        draw: number of the sample, if several samples for the same body are wanted.

    Raises:
        FeedbackError: the body cannot be written as JSON (such as a text with a lone surrogate).
    """
    try:
        text = json.dumps([body, draw], sort_keys=True, ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()
    except (TypeError, ValueError) as error:
        raise FeedbackError(
            f"a judge's request cannot be written as JSON: {error}. Check the texts and `extra`"
        ) from error


class AnswerCache:
    """A cache of a judge's answers in a file, by request key; a context manager.

    Several processes may use the file at once.

    Raises:
        FeedbackError: the file is not such a cache, or another version wrote it.
    """

    def __init__(self, file: Path):
        self.file = Path(file)
        self._connection: sqlite3.Connection | None = None

    def __enter__(self) -> AnswerCache:  # noqa: PYI034  (beartype takes no Self on a method)
        # Autocommit: every statement is a transaction. It waits up to a minute for other writers.
        connection = None
        try:
            make_private(self.file)
            connection = sqlite3.connect(self.file, timeout=60, isolation_level=None)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")  # on the disk when `put` returns
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise FeedbackError(
                    f"{self.file}: found version {version} of the judge's cache; expected "
                    f"{_VERSION}. Choose another file with `cache`."
                )
            connection.execute(
                "CREATE TABLE IF NOT EXISTS answers "
                "(key TEXT PRIMARY KEY, model TEXT, request TEXT, answer TEXT) WITHOUT ROWID"
            )
            connection.execute(f"PRAGMA user_version = {_VERSION}")
        except (OSError, sqlite3.DatabaseError) as error:
            if connection is not None:
                connection.close()
            raise FeedbackError(
                f"{self.file}: cannot be used as a judge's cache: {error}. Choose another file "
                "with `cache`."
            ) from error
        except FeedbackError:
            if connection is not None:
                connection.close()
            raise
        self._connection = connection
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open().close()
        self._connection = None

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer stored under `key`, or None."""
        row = self._open().execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, body: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Stores an answer with the request (for people to read), unless the key has an answer.

        Raises:
            FeedbackError: the answer could not be written, for example because the disk is full.
        """
        row = (key, body["model"], json.dumps(body), json.dumps(answer))
        try:
            self._open().execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", row)
        except sqlite3.DatabaseError as error:
            raise FeedbackError(
                f"{self.file}: an answer could not be stored: {error}. Check the disk and rerun."
            ) from error

    def remove(self, key: str) -> None:
        """Deletes the answer stored under `key`, if there is one."""
        self._open().execute("DELETE FROM answers WHERE key = ?", (key,))

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise RuntimeError("the cache is not open. Use it inside `with cache:`")
        return self._connection
