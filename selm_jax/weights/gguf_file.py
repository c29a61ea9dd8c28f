"""Reads the keys and tensors of GGUF files; errors name the file and the key.

llama.cpp splits large models into files `NAME-00001-of-00003.gguf`. The first has the keys; each
has some of the tensors, its number (`split.no`, from 0) and the number of files (`split.count`).
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from jaxtyping import Float32

from selm_jax.shell.json_file import POINTER, is_pointer
from selm_jax.weights.wheels import sha256_of

T = TypeVar("T")

MEND = "Get the model as another GGUF file or as a Hugging Face folder instead"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


class GGUFError(ValueError):
    """The GGUF file is damaged, or contains something that the converter does not support."""


class Gguf(NamedTuple):
    """A GGUF model in one or several files, memory-mapped.

    Attributes:
      fields: the keys, by name.
      tensors: the tensors of all files, in order.
      file_of: the file of each tensor, by its name.
    """

    fields: Mapping[str, Any]
    tensors: list[ReaderTensor]
    file_of: Mapping[str, Path]


def names_of(name: str) -> list[str]:
    """The names of all files of the GGUF model that the file `name` belongs to, in order."""
    path = Path(name)
    part = _PART.fullmatch(path.stem)
    if part is None or not int(part[3]):
        return [name]
    stem, _, count = part.groups()
    return [f"{stem}-{n:05d}-of-{count}{path.suffix}" for n in range(1, int(count) + 1)]


def files_of(path: Path) -> list[Path]:
    """All files of the GGUF model that the file `path` belongs to, in order.

    Raises:
      GGUFError: if a file is missing.
    """
    files = [path.with_name(name) for name in names_of(path.name)]
    for file in files:
        if len(files) > 1 and not file.is_file():
            raise GGUFError(
                f"{file} is missing: a model in {len(files)} GGUF files needs all of them in one "
                "folder"
            )
    return files


def digest_of_model(path: Path) -> str:
    """The SHA-256 of a GGUF file. A split model has the SHA-256 of its files' digests in order."""
    digests = [sha256_of(file) for file in files_of(path)]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def model_name(path: Path) -> str:
    """The file's name without its suffix and, for a split model, without the part number."""
    part = _PART.fullmatch(path.stem)
    return path.stem if part is None else part[1]


def open_gguf(path: Path) -> Gguf:
    """Opens the GGUF model that the file `path` belongs to, and reads its keys and tensor list.

    Raises:
      FileNotFoundError: if there is no such file.
      GGUFError: if the file is not GGUF, cut off or visibly damaged; or if a part is missing or
        belongs to another model.
    """
    files = files_of(path)
    readers = [_read(file) for file in files]
    tensors, file_of = [], {}
    for number, (file, reader) in enumerate(zip(files, readers, strict=True)):
        fields = Fields(file, reader)
        count = fields.get("split.count", int) or 1
        if count != len(files):
            raise GGUFError(
                f"{file} is one of {count} files according to its key split.count, but one of "
                f"{len(files)} according to its name. Keep the original names of the files: "
                f"NAME-00001-of-{count:05d}.gguf"
            )
        if (said := fields.get("split.no", int) or 0) != number:
            raise GGUFError(
                f"{file} is part {said + 1} according to its key split.no, but part {number + 1} "
                "according to its name. Download the files again"
            )
        tensors += reader.tensors
        file_of |= {tensor.name: file for tensor in reader.tensors}
    wanted = Fields(files[0], readers[0]).get("split.tensors.count", int)
    if wanted not in (None, len(tensors)):
        raise GGUFError(
            f"{files[0]}: its {len(files)} files have {len(tensors)} tensors, but key "
            f"split.tensors.count says {wanted}. Download the files again"
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
        raise GGUFError(
            f"{path}: not a GGUF file: it starts with {magic!r}, expected b'GGUF'. Name another "
            "file"
        )
    try:
        # On damaged bytes the reader computes nonsense before it fails; its overflow warnings add
        # nothing to the error below.
        with np.errstate(all="ignore"):
            return GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, ArithmeticError, MemoryError) as error:
        raise GGUFError(
            f"{path}: damaged, cut off, or of a newer format ({type(error).__name__}: {error}). "
            f"Its size is {path.stat().st_size} bytes; compare it with the source, or download the "
            "file again"
        ) from error


class Fields:
    """Reads the key/value pairs of a file; its errors name the file and the key.

    Attributes:
      path: the file.
      prefix: what precedes the name that is asked for in the name of each key.
    """

    def __init__(self, path: Path, reader: GGUFReader | Gguf, prefix: str = ""):
        self.path, self.prefix = path, prefix
        self._reader = reader

    def under(self, name: str) -> Fields:
        """The pairs whose keys begin with `name` and a dot."""
        return Fields(self.path, self._reader, f"{self.prefix}{name}.")

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self._reader.fields

    def __iter__(self) -> Iterator[str]:
        """The keys, without the prefix."""
        start = len(self.prefix)
        return (key[start:] for key in self._reader.fields if key.startswith(self.prefix))

    def get(self, key: str, kind: type[T]) -> T | None:
        """The value of a key, which must have the type `kind`; None if the file has no such key."""
        name = self.prefix + key
        field = self._reader.fields.get(name)
        if field is None:
            return None
        try:
            value = field.contents()
        except (ValueError, IndexError) as error:
            raise GGUFError(f"{self.path}: key {name} cannot be read: {error}. {MEND}") from error
        # In Python a bool is an int; here a flag in place of a number means a damaged file.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise GGUFError(
                f"{self.path}: key {name} is {value!r:.80}; expected the type {kind.__name__}. "
                f"{MEND}"
            )
        return value

    def need(self, key: str, kind: type[T]) -> T:
        """The value of a key, as by `get`; raises GGUFError if the file has no such key."""
        value = self.get(key, kind)
        if value is None:
            raise GGUFError(f"{self.path}: key {self.prefix}{key} is missing. {MEND}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """The value of a key that must be a whole number of at least 1."""
        if default is not None and key not in self:
            return default
        value = self.need(key, int)
        if value <= 0:
            raise GGUFError(
                f"{self.path}: key {self.prefix}{key} is {value}; expected at least 1. {MEND}"
            )
        return value

    def number(self, key: str, default: float | None = None, zero: bool = False) -> float:
        """The value of a key that must be a positive float32, as the shortest decimal (1e-05).

        With `zero` it may be 0, too.
        """
        if default is not None and key not in self:
            return default
        value = float(str(np.float32(self.need(key, float))))
        if not 0 < value < float("inf") and not (zero and value == 0):
            raise GGUFError(
                f"{self.path}: key {self.prefix}{key} is {value}; expected a positive number"
                f"{' or 0' * zero}. {MEND}"
            )
        return value

    def texts(self, key: str) -> list[str]:
        """The value of a key that must be an array of strings."""
        values = self.need(key, list)
        if not all(isinstance(v, str) for v in values):
            raise GGUFError(
                f"{self.path}: key {self.prefix}{key} is not an array of strings. {MEND}"
            )
        return values


def numbers_of(
    path: Path, tensor: ReaderTensor, part: int | None = None
) -> Float32[np.ndarray, ...]:
    """The numbers of a tensor in the file `path`, or of one entry of its first axis, dequantised.

    Raises:
      GGUFError: if a number is NaN or infinity.
    """
    data = tensor.data if part is None else tensor.data[part]
    with np.errstate(all="ignore"):  # damaged numbers are reported below, by name
        values = dequantize(data, tensor.tensor_type).astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise GGUFError(
            f"{path}: tensor {tensor.name} contains NaN or infinity, so the file is damaged. "
            "Download it again"
        )
    return values
