"""Answers that were paid for, on disk: one SQLite file that a killed process cannot spoil.

An answer is filed under the SHA-256 of all that its request says. It is on the disk before anybody
sees it, so that whatever was decided with it can be decided again without paying again.
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

_VERSION = 1  # of the table and of what the key is made of


def request_key(body: Mapping[str, Any], draw: int = 0) -> str:
    """SHA-256, in hex, of a request: model name, messages (template and texts), sampling.

    Args:
        body: the JSON body of the request. The order of its keys does not matter.
        draw: tells repeated requests of one body apart, where several samples are wanted.

    Raises:
        FeedbackError: the body is not JSON (a lone surrogate in a text is no character).
    """
    try:
        text = json.dumps([body, draw], sort_keys=True, ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()
    except (TypeError, ValueError) as error:
        raise FeedbackError(f"a judge's request cannot be written as JSON: {error}") from error


class AnswerCache:
    """Answers by key. A context manager; several processes may have the file open.

    Raises:
        FeedbackError: the file is not such a cache, or was written by another version.
    """

    def __init__(self, file: Path):
        self.file = Path(file)
        self._connection: sqlite3.Connection | None = None

    def __enter__(self) -> AnswerCache:  # noqa: PYI034  (beartype takes no Self on a method)
        # Autocommit: every statement is a transaction. Other writers are waited for, a minute.
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
                    f"{_VERSION}. Name another file with `cache`."
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
                f"{self.file}: cannot be used as a judge's cache: {error}. Name another file with "
                "`cache`."
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
        """The answer filed under `key`, or None."""
        row = self._open().execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, body: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Files an answer, with its request for people who read the cache. The first one stays.

        Raises:
            FeedbackError: the answer could not be written (the disk is full, say).
        """
        row = (key, body["model"], json.dumps(body), json.dumps(answer))
        try:
            self._open().execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", row)
        except sqlite3.DatabaseError as error:
            raise FeedbackError(f"{self.file}: an answer could not be written: {error}.") from error

    def remove(self, key: str) -> None:
        """Forgets the answer filed under `key`, if there is one."""
        self._open().execute("DELETE FROM answers WHERE key = ?", (key,))

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise RuntimeError("the cache is used outside its `with`")
        return self._connection
