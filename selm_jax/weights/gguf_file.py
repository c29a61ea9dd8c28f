"""The reading half of the GGUF converter: a file's keys and tensors, with errors that name both."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TypeVar

import numpy as np
from gguf import GGUFReader

T = TypeVar("T")


class GGUFError(ValueError):
    """The GGUF file is damaged, or holds something this converter does not know."""


def open_gguf(path: Path) -> GGUFReader:
    """The file, memory-mapped, its keys and tensor list read.

    Raises:
      FileNotFoundError: no such file.
      GGUFError: not GGUF, cut off, or damaged where the reader can see it.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such GGUF file", str(path))
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise GGUFError(f"{path}: not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
    try:
        # A reader of damaged bytes counts wildly before it fails; its overflow warnings say nothing
        # that the error below does not.
        with np.errstate(all="ignore"):
            return GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, ArithmeticError, MemoryError) as error:
        raise GGUFError(
            f"{path}: damaged, cut off, or of a newer format ({type(error).__name__}: {error}); "
            f"the file has {path.stat().st_size} bytes: compare with the source, download again"
        ) from error


class Fields:
    """The key/value half of the file, with errors (GGUFError) that name the file and the key."""

    def __init__(self, path: Path, reader: GGUFReader):
        self.path = path
        self._fields = reader.fields

    def get(self, key: str, kind: type[T]) -> T | None:
        """One value of this Python type (list for an array), or None where the key is absent."""
        field = self._fields.get(key)
        if field is None:
            return None
        try:
            value = field.contents()
        except (ValueError, IndexError) as error:
            raise GGUFError(f"{self.path}: key {key} cannot be read: {error}") from error
        # bool is an int to Python; a flag where a number belongs is a damaged file to us
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise GGUFError(
                f"{self.path}: key {key} holds {value!r:.80}, expected one {kind.__name__}"
            )
        return value

    def need(self, key: str, kind: type[T]) -> T:
        """As `get`, but an absent key is an error."""
        value = self.get(key, kind)
        if value is None:
            raise GGUFError(f"{self.path}: key {key} is missing")
        return value

    def size(self, key: str) -> int:
        """A count of at least one."""
        value = self.need(key, int)
        if value <= 0:
            raise GGUFError(f"{self.path}: key {key} is {value}, expected at least 1")
        return value

    def number(self, key: str) -> float:
        """A float32 as the shortest decimal that gives it back: 1e-05, not 9.99999974e-06."""
        value = float(str(np.float32(self.need(key, float))))
        if not 0 < value < float("inf"):
            raise GGUFError(f"{self.path}: key {key} is {value}, expected a positive number")
        return value

    def texts(self, key: str) -> list[str]:
        """An array of strings."""
        values = self.need(key, list)
        if not all(isinstance(v, str) for v in values):
            raise GGUFError(f"{self.path}: key {key} holds other things than texts")
        return values
