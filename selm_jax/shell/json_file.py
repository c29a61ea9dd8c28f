"""Reads JSON objects from files of other programs; errors say what is wrong with the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selm_jax.shell import jsonl

_POINTER = b"version https://git-lfs"
_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


class JsonFileError(ValueError):
    """A file does not contain one JSON object. The message names the file and the problem."""


def is_pointer(file: Path) -> bool:
    """Says whether the file is a Git LFS pointer, which `git clone` leaves for a large file."""
    with file.open("rb") as f:
        return f.read(len(_POINTER)) == _POINTER


POINTER = (
    "is a Git LFS pointer; the file itself was not downloaded. Run `git lfs pull` in its folder, "
    "or download the file"
)
"""The message for such a file, to be put after its name."""


def read_object(file: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
      JsonFileError: the file contains anything else.
      FileNotFoundError: no such file.
    """
    if is_pointer(file):
        raise JsonFileError(f"{file} {POINTER}")
    raw = file.read_bytes()
    if raw.startswith(_MARKS):
        raise JsonFileError(
            f"{file} begins with a byte order mark, which JSON does not have and other programs "
            "refuse. Save it as UTF-8 without one"
        )
    try:
        found = jsonl.value(raw.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise JsonFileError(f"{file} is not UTF-8 text; expected JSON") from e
    except jsonl.JsonError as e:
        raise JsonFileError(f"{file} is not JSON: {e}") from e
    if not isinstance(found, dict):
        raise JsonFileError(f"{file} contains {_KINDS[type(found)]}; expected an object, {{...}}")
    return found


_KINDS = {
    list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false",
    type(None): "null",
}  # fmt: skip
