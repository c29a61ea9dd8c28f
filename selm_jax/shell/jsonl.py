"""JSON lines in: one JSON value on each line of a file. Everything that reads such lines does it here.

Only a line feed ends a line. `str.splitlines` also cuts at U+2028, U+2029 and U+0085, which JSON
allows inside a text and which web pages are full of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


class JsonError(ValueError):
    """A text that is not one JSON value. The message says why, in words that follow a place."""


class Line(NamedTuple):
    """One line that is not blank.

    Attributes:
      number: from 1, in its file; blank lines count.
      raw: its bytes, without the line feed.
      ended: a line feed ended it. The last line has none where a kill tore it, or where its writer
        leaves the last one out.
    """

    number: int
    raw: bytes
    ended: bool

    @property
    def text(self) -> str:
        """Raises JsonError if the bytes are not UTF-8."""
        try:
            return self.raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise JsonError("not UTF-8 text. Save the file as UTF-8") from error

    def value(self) -> Any:
        """The JSON value. Raises JsonError, as `value` does."""
        return value(self.text)


def lines(raw: bytes) -> Iterator[Line]:
    """The lines of a file's bytes that are not blank. A byte order mark at the start is no text."""
    rows = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, row in enumerate(rows, start=1):
        if row.strip():
            yield Line(number, row, ended=number < len(rows))


def value(text: str) -> Any:
    """One JSON value.

    Raises:
      JsonError: the text is not JSON, an object has a key twice (which one is meant would be a
        guess), a number is too long, or lists and objects are nested too deeply to be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise JsonError(f"{error.msg} at {place}character {error.colno}") from error
    except RecursionError:
        # Without the cause: a trace of a thousand frames says nothing more.
        raise JsonError("lists or objects are nested too deeply to be read") from None
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(str(error)) from error


def digest(values: Iterable[Any]) -> str:
    """SHA-256 of JSON values one after the other, in hex: of what they say, not of how it is spelt."""
    lines = "".join(json.dumps(each, sort_keys=True) + "\n" for each in values)
    return hashlib.sha256(lines.encode()).hexdigest()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise JsonError(f"the key {twice!r} stands twice in one object")
    return found
