"""Reads JSON lines, one JSON value per line. All code that reads such files uses this module.

Only a line feed ends a line. `str.splitlines` also splits at U+2028, U+2029 and U+0085, which JSON
allows inside a string and which are common in text from web pages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


class JsonError(ValueError):
    """A text is not one JSON value. The message says why; callers prepend the location."""


class Line(NamedTuple):
    """A non-blank line of a file.

    Attributes:
      number: its number in the file, from 1; blank lines count.
      raw: its bytes, without the line feed.
      ended: whether it ends with a line feed. The last line may not: a kill cut it off, or its
        writer omits the last line feed.
    """

    number: int
    raw: bytes
    ended: bool

    @property
    def text(self) -> str:
        """The line as text. Raises JsonError if the bytes are not UTF-8."""
        try:
            return self.raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise JsonError("not UTF-8 text. Save the file as UTF-8") from error

    def value(self) -> Any:
        """The JSON value of the line. Raises JsonError if the line is not JSON."""
        return value(self.text)


def lines(raw: bytes) -> Iterator[Line]:
    """Splits a file's bytes into the lines that are not blank. Drops a byte order mark."""
    rows = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, row in enumerate(rows, start=1):
        if row.strip():
            yield Line(number, row, ended=number < len(rows))


def value(text: str) -> Any:
    """Parses one JSON value.

    Raises:
      JsonError: the text is not JSON, an object has a key twice (it would be a guess which one is
        meant), a number is too long, or lists and objects are nested too deeply to be read.
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


def values_digest(values: Iterable[Any]) -> str:
    """SHA-256 of a sequence of JSON values, in hex. Spacing and order of keys do not matter."""
    lines = "".join(json.dumps(each, sort_keys=True) + "\n" for each in values)
    return hashlib.sha256(lines.encode()).hexdigest()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise JsonError(f"the key {twice!r} appears twice in one object")
    return found
