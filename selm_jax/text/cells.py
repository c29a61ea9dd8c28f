"""What one cell of a row holds: conversations and numbers that were kept as text, and values that a
row may carry along."""

from __future__ import annotations

import ast
import datetime
import decimal
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

from selm_jax.shell import jsonl
from selm_jax.text.tables import BadRow

_DEEPEST = 64  # lists and objects inside each other, in a row
_STRING = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_PIECES = re.compile(rf"""{_STRING}|['"]|\}}\s+(?=\{{)""", re.DOTALL)
_STRINGS = re.compile(_STRING, re.DOTALL)
_BEGINS_AS_MESSAGES = re.compile(
    r"""\s*(array\(\s*)?\[\s*\{\s*['"](role|content|from|value)['"]\s*:"""
)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


def unwrapped(value: Any, column: str) -> Any:
    """The list of messages that a cell holds as text; any other value as it is.

    pandas writes a list of messages into CSV as Python text, other tools as JSON. Taken for a plain
    text, all of it would be trained on, braces too.

    Raises:
      BadRow: the text begins as a list of messages and cannot be read as one.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", "array(")):
        return value
    found = structure(value)
    messages = found if isinstance(found, list) else [found]
    if messages and all(map(_is_message, messages)):
        return found
    if found is None and _BEGINS_AS_MESSAGES.match(value):
        detail = (
            f"{shortened(value)} begins as a list of messages that was kept as text, but is neither "
            "whole JSON nor a whole Python list. Keep conversations in .jsonl or .parquet; a text "
            'that is meant so stands as [{"role": "user", "content": ...}] there.'
        )
        raise BadRow("bad message", column, detail)
    return value


def structure(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or object that a text is in JSON or in Python; None if it is neither. Nothing runs."""
    for read in (jsonl.value, _python):
        try:
            found = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return found if isinstance(found, list | dict) else None
    return None


def as_number(value: Any) -> float | None:
    """The finite number that a cell holds, as such or as text; None if it holds none."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond all floats
        return None


def carried(values: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that go along with a prompt, as values that JSON has.

    A date becomes ISO text, a decimal number a float. Columns of bytes and the like are left out.

    Raises:
      BadRow: see `check`.
    """
    kept = {}
    for column, value in values.items():
        check(value, column)
        try:
            kept[column] = _plain(value)
        except TypeError:
            continue
    return kept


def check(value: Any, column: str, depth: int = 0) -> None:
    """Looks through texts, lists and objects.

    Raises:
      BadRow: a text holds half a surrogate pair, which nothing can write as UTF-8, or the lists and
        objects are nested too deeply.
    """
    if isinstance(value, str):
        if not value.isascii():
            _check_text(value, column)
    elif isinstance(value, list | tuple | dict):
        if depth == _DEEPEST:
            detail = f"lists or objects are nested more than {_DEEPEST} levels deep."
            raise BadRow("nested too deeply", column, detail)
        for each in itertools.chain(*value.items()) if isinstance(value, dict) else value:
            check(each, column, depth + 1)


def shortened(value: object) -> str:
    """The value as Python prints it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_text(text: str, column: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        detail = (
            f"{text[error.start]!a} at character {error.start + 1} is half of a pair that "
            "stands for one character; alone it is none, and UTF-8 cannot hold it."
        )
        raise BadRow("lone surrogate", column, detail) from error


def _is_message(value: Any) -> bool:
    """Whether it is a turn in the usual keys, or in ShareGPT's (which are refused, as such)."""
    if not isinstance(value, dict):
        return False
    sharegpt = {"from", "value"} <= value.keys() and value["from"] in ("human", "gpt", "system")
    return {"role", "content"} <= value.keys() or sharegpt


def _python(text: str) -> Any:
    """A Python literal. Raises ValueError or SyntaxError if it is none.

    What is inside the texts is set aside first, so that the parser gets nothing that is deep.
    numpy writes an array of objects without commas, and pandas an array into a cell: they are added.
    """

    def piece(found: re.Match[str]) -> str:
        if len(found[0]) == 1:
            raise ValueError("a text that does not end")
        return found[0] if found[0][0] in "'\"" else "},"

    whole = _PIECES.sub(piece, text)
    depths = itertools.accumulate(
        (character in "[{(") - (character in "]})") for character in _STRINGS.sub("", whole)
    )
    if max(depths, default=0) > _DEEPEST:
        raise ValueError("nested too deeply")
    return ast.literal_eval(whole.strip())


def _plain(value: Any) -> Any:
    """Raises TypeError for a kind that JSON does not have."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(each) for key, each in value.items()}
    raise TypeError(type(value).__name__)
