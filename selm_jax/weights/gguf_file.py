"""The reading half of the GGUF converter: keys and tensors, with errors that name both.

llama.cpp splits large models into files `NAME-00001-of-00003.gguf`. The first has the keys; each has
some of the tensors, its number (`split.no`, from 0) and how many files there are (`split.count`).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from gguf import GGUFReader, ReaderTensor

from selm_jax.shell.json_file import POINTER, is_pointer

T = TypeVar("T")

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


class GGUFError(ValueError):
    """The GGUF file is damaged, or holds something this converter does not know."""


class Gguf(NamedTuple):
    """A model in one file or in several, memory-mapped.

    Attributes:
      fields: the keys, by name.
      tensors: those of all files, one file after the other.
      file_of: the file of each tensor, by its name.
    """

    fields: Mapping[str, Any]
    tensors: list[ReaderTensor]
    file_of: Mapping[str, Path]


def files_of(path: Path) -> list[Path]:
    """All files of the model that this file holds, or holds a part of, in order.

    Raises:
      GGUFError: one is missing.
    """
    part = _PART.fullmatch(path.stem)
    if part is None:
        return [path]
    stem, _, count = part.groups()
    files = []
    for n in range(1, int(count) + 1):
        files.append(path.with_name(f"{stem}-{n:05d}-of-{count}{path.suffix}"))
        if not files[-1].is_file():
            raise GGUFError(
                f"{files[-1]} is missing: a model in {int(count)} GGUF files needs all of them in "
                "one folder"
            )
    return files or [path]


def model_name(path: Path) -> str:
    """The name of the model's file without its suffix and without the number of a part."""
    part = _PART.fullmatch(path.stem)
    return path.stem if part is None else part[1]


def open_gguf(path: Path) -> Gguf:
    """The model that this file holds, or holds a part of: its keys and tensor list read.

    Raises:
      FileNotFoundError: no such file.
      GGUFError: not GGUF, cut off, or damaged where the reader can see it; or a part is missing, or
        is one of another model.
    """
    files = files_of(path)
    readers = [_read(file) for file in files]
    tensors, file_of = [], {}
    for number, (file, reader) in enumerate(zip(files, readers, strict=True)):
        fields = Fields(file, reader)
        count = fields.get("split.count", int) or 1
        if count != len(files):
            raise GGUFError(
                f"{file}: it is one of {count} files (split.count), but its name stands for one of "
                f"{len(files)}. Keep the names that the files came with: NAME-00001-of-{count:05d}.gguf"
            )
        if (said := fields.get("split.no", int) or 0) != number:
            raise GGUFError(
                f"{file}: it is part {said + 1} by its key split.no and part {number + 1} by its "
                "name. Get the files anew"
            )
        tensors += reader.tensors
        file_of |= {tensor.name: file for tensor in reader.tensors}
    wanted = Fields(files[0], readers[0]).get("split.tensors.count", int)
    if wanted not in (None, len(tensors)):
        raise GGUFError(
            f"{files[0]}: its {len(files)} files hold {len(tensors)} tensors, key "
            f"split.tensors.count says {wanted}. Get the files anew"
        )
    return Gguf(readers[0].fields, tensors, file_of)


def _read(path: Path) -> GGUFReader:
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such GGUF file", str(path))
    with path.open("rb") as file:
        magic = file.read(4)
    if is_pointer(path):
        raise GGUFError(f"{path} {POINTER}")
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

    def __init__(self, path: Path, reader: GGUFReader | Gguf):
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
