"""Reads cells of a data row: conversations or numbers stored as text, and any other values."""

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

_DEEPEST = 64  # the deepest nesting of lists and objects in a row
_STRING = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_PIECES = re.compile(rf"""{_STRING}|['"]|\}}\s+(?=\{{)""", re.DOTALL)
_STRINGS = re.compile(_STRING, re.DOTALL)
_BEGINS_AS_MESSAGES = re.compile(
    r"""\s*(array\(\s*)?\[\s*\{\s*['"](role|content|from|value)['"]\s*:"""
)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


def unwrapped(value: Any, column: str) -> Any:
    """Parses a cell that stores a list of messages as text; returns other values unchanged.

    pandas writes a list of messages into CSV as Python text, other tools as JSON. If it
    were taken as plain text, training would use all of it, including the braces.

    Raises:
      BadRow: if the text begins like a list of messages but cannot be read as one.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", "array(")):
        return value
    found = structure(value)
    messages = found if isinstance(found, list) else [found]
    if messages and all(map(_is_message, messages)):
        return found
    if found is None and _BEGINS_AS_MESSAGES.match(value):
        detail = (
            f"{shortened(value)} begins like a list of messages stored as text, but is neither "
            "valid JSON nor a valid Python list. Store conversations in .jsonl or .parquet. If it "
            'is a plain text, store it there as [{"role": "user", "content": ...}].'
        )
        raise BadRow("bad message", column, detail)
    return value


def structure(text: str) -> list[Any] | dict[str, Any] | None:
    """Parses a list or object in JSON or Python literal syntax (runs no code); None if neither."""
    for read in (jsonl.value, _python):
        try:
            found = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return found if isinstance(found, list | dict) else None
    return None


def as_number(value: Any) -> float | None:
    """The finite number in a cell, stored as a number or as text; None if there is none."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond all floats
        return None


def carried(values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the remaining columns of a row to values that JSON can represent.

    Dates become ISO text, and decimal numbers become floats. Columns that JSON cannot represent,
    such as bytes, are left out.

    Raises:
      BadRow: as for `check`.
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
    """Checks a value, and recursively its items, for invalid text and excessive nesting.

    Raises:
      BadRow: if a text contains half of a surrogate pair, which cannot be written as UTF-8, or if
        lists and objects are nested too deeply.
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
    """The value's `repr`, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_text(text: str, column: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        detail = (
            f"{text[error.start]!a} at character {error.start + 1} is half of a surrogate pair; "
            "alone it is not a character and cannot be written as UTF-8."
        )
        raise BadRow("lone surrogate", column, detail) from error


def _is_message(value: Any) -> bool:
    """Says whether a value has a message's keys, or ShareGPT's (which are refused later)."""
    if not isinstance(value, dict):
        return False
    sharegpt = {"from", "value"} <= value.keys() and value["from"] in ("human", "gpt", "system")
    return {"role", "content"} <= value.keys() or sharegpt


def _python(text: str) -> Any:
    """Reads a Python literal; raises ValueError or SyntaxError if the text is not one.

    Deep nesting is refused before the parser sees it; brackets inside strings do not count. numpy,
    and so pandas, writes an array of objects without commas; they are added here.
    """

    def piece(found: re.Match[str]) -> str:
        if len(found[0]) == 1:
            raise ValueError("a string has no closing quotation mark")
        return found[0] if found[0][0] in "'\"" else "},"

    whole = _PIECES.sub(piece, text)
    depths = itertools.accumulate(
        (character in "[{(") - (character in "]})") for character in _STRINGS.sub("", whole)
    )
    if max(depths, default=0) > _DEEPEST:
        raise ValueError("lists or objects are nested too deeply")
    return ast.literal_eval(whole.strip())


def _plain(value: Any) -> Any:
    """Converts a value to JSON types; raises TypeError for a type that JSON does not have."""
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
    raise TypeError(f"JSON cannot represent {type(value).__name__}")
