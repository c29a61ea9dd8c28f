"""Reads parts of safetensors files (one, or several with an index), and writes such files.

The format (https://github.com/huggingface/safetensors, "Format"): eight bytes of header length,
little-endian; the header as JSON, padded with spaces to a multiple of eight; the data.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open

from selm_jax.shell.json_file import POINTER, JsonFileError, is_pointer, read_object
from selm_jax.weights.bucket import InBucket, is_elsewhere, is_there

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""The dtypes that parameters may be stored in, by safetensors' names."""
_READ = DTYPES | {"U8": np.uint8}  # bytes have a meaning of their own (`weights.mxfp4`)

MAX_SHARD_BYTES = 5 * 10**9
"""The most bytes of data in one file: transformers' "5GB", fine for file systems and downloads."""


class WeightsError(ValueError):
    """The tensors in a folder are damaged, or do not match its config.json."""


class Stored(NamedTuple):
    """The shape of a tensor in a file, and the name that safetensors gives its dtype."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # as in BF16 and F8_E4M3; BOOL has a byte
        return math.prod(self.shape) * int(bits[0] if bits else 8) // 8


_Bytes = np.memmap | InBucket  # both are sliced: the bytes from one place to another


class Checkpoint:
    """The tensors in a model folder, memory-mapped: only the parts that are used are read.

    The bytes of a folder that stands for one in a bucket are read from there, whole rows at a time.

    Attributes:
      folder: the folder.
      tensors: shape and dtype of every tensor, by name.
      file_of: the name of each tensor's file.
    """

    def __init__(self, folder: Path, where: Mapping[str, tuple[_Bytes, int, Stored]]):
        self.folder = folder
        self.tensors = {name: stored for name, (_, _, stored) in where.items()}
        self.file_of = {name: Path(str(f.filename)).name for name, (f, _, _) in where.items()}
        self._where = where  # file, first byte, what
        self._name, self._rows = "", {}  # of the tensor that was read last, by first and last byte

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The tensors that are keys of `names`, under other names."""
        return Checkpoint(self.folder, {new: self._where[old] for old, new in names.items()})

    def read(self, name: str, cuts: Sequence[slice] = ()) -> np.ndarray:
        """Returns the part of a tensor that the slices select: a view of the file, not a copy."""
        file, first, stored = self._where[name]
        shape, rest = stored.shape, tuple(cuts)
        stop = first + stored.bytes
        if rest and stored.bytes:  # whole rows, which are contiguous
            begin, end, _ = rest[0].indices(shape[0])
            row = stored.bytes // shape[0]
            first, stop = first + begin * row, first + end * row
            shape, rest = (end - begin, *shape[1:]), (slice(None), *rest[1:])
        if self._name != name:
            self._name, self._rows = name, {}
        if (first, stop) not in self._rows:  # several devices may want columns of the same rows
            self._rows[first, stop] = file[first:stop]
        rows = self._rows[first, stop].view(_READ[stored.dtype])
        part = rows.reshape(shape)[rest]
        return part if part.flags.aligned else part.copy()

    def bytes_of(self, name: str) -> UInt8[np.ndarray, " bytes"]:
        """Returns the bytes of a tensor, whatever its dtype."""
        file, first, stored = self._where[name]
        return file[first : first + stored.bytes]

    def same(self, one: str, other: str) -> bool:
        """Says whether two matrices are there with the same bytes; NaN is the same as itself."""
        stored = self.tensors.get(one)
        if stored is None or stored != self.tensors.get(other):
            return False
        if len(stored.shape) != 2 or stored.dtype not in DTYPES:
            return False
        some = 1024  # rows at a time: two whole embeddings would need too much memory

        def rows(name: str, at: int) -> np.ndarray:
            return self.read(name, [slice(at, at + some), slice(None)]).view(np.uint8)

        return all(
            np.array_equal(rows(one, at), rows(other, at)) for at in range(0, stored.shape[0], some)
        )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens a checkpoint of one file (`model.safetensors`), or of several files with an index.

    Raises:
      WeightsError: if a file is missing or incomplete, or the index names a missing tensor.
    """
    folder = Path(folder)
    index = folder / INDEX
    file_of = read_index(folder)
    where = {}
    for file in sorted(set(file_of.values())) if file_of else [WHOLE]:
        if not is_there(folder / file):
            named = f"; {index.name} names it" if file_of else ""
            raise WeightsError(f"{folder}: {file} is missing{named}. Download it into this folder")
        held = _open_file(folder / file)
        wanted = [n for n, f in file_of.items() if f == file] if file_of else held
        for name in wanted:
            if name not in held:
                raise WeightsError(
                    f"{index} says that {name} is in {file}, which has no such tensor. Get both "
                    "files again"
                )
            where[name] = held[name]
    return Checkpoint(folder, where)


def damage_of(path: Path) -> str | None:
    """Says what is wrong with a safetensors file, as the end of a sentence; None if it is intact.

    Only the header is read and compared with the file's size.
    """
    if is_elsewhere(path):
        return None  # it was looked at when the folder was made
    if is_pointer(path):
        return POINTER
    try:
        with safe_open(path, framework="numpy"):
            return None
    except (SafetensorError, OSError) as e:
        return f"is damaged or cut off: {e}. Get the file again"


def _open_file(path: Path) -> dict[str, tuple[_Bytes, int, Stored]]:
    if wrong := damage_of(path):
        raise WeightsError(f"{path} {wrong}")
    if is_elsewhere(path):
        file = InBucket(path)
        start, header = file.start, dict(file.header)
    else:
        # The library would copy every part on the host first; mapping the file avoids this.
        file = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(file[:8].tobytes(), "little")
        header = json.loads(file[8:start].tobytes())
    header.pop("__metadata__", None)
    return {
        name: (file, start + t["data_offsets"][0], Stored(tuple(t["shape"]), t["dtype"]))
        for name, t in header.items()
    }


def index_is_passed_over(folder: Path) -> bool:
    """Returns whether the folder's index is ignored because there is a `model.safetensors`.

    transformers does the same. An earlier save may have left the index.
    """
    return is_there(folder / WHOLE) and (folder / INDEX).exists()


def read_index(folder: Path) -> dict[str, str] | None:
    """Maps tensors to files, by the index; None if there is only `model.safetensors`.

    Raises:
      WeightsError: if the index is invalid.
    """
    index = folder / INDEX
    if is_there(folder / WHOLE) or not index.exists():
        return None
    try:
        file_of = read_object(index)["weight_map"]
        if not file_of or any(Path(name).name != name for name in file_of.values()):
            raise ValueError("weight_map is empty, or names files in other folders")
    except JsonFileError as e:
        raise WeightsError(str(e)) from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise WeightsError(
            f"{index}: not an index of safetensors files ({e!r}). Get the file again"
        ) from e
    return file_of


def refuse_not_finite(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Raises WeightsError if `names`, the tensors with NaN or infinity, is not empty."""
    bad = list(dict.fromkeys(names))
    if not bad:
        return
    shown = "\n  ".join(f"{name}, in {checkpoint.file_of[name]}" for name in bad[:20])
    more = f"\n  ... and {len(bad) - 20} more" if len(bad) > 20 else ""
    raise WeightsError(
        f"{checkpoint.folder}: these tensors contain NaN or infinity:\n  {shown}{more}\n"
        "A model cannot compute anything with such weights. Get the files again and compare their "
        "digests with the source's. If training wrote them, it diverged: use an earlier model"
    )


def part_of(
    tensors: Mapping[str, Stored], part: tuple[int, int], max_shard_bytes: int
) -> frozenset[str]:
    """The tensors in every n-th of the files that `write` makes, from file i on; `part` is (i, n).

    So n processes can share the work, and the files are the same however many there are.
    """
    start, step = part
    return frozenset(
        name for names in _shards(tensors, max_shard_bytes)[start::step] for name in names
    )


def write(
    folder: Path,
    tensors: Mapping[str, Stored],
    values: Iterable[tuple[str, np.ndarray | None]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    only: Container[str] | None = None,
) -> None:
    """Writes tensors into `folder`, as one model.safetensors or as several files with an index.

    Args:
      folder: an existing folder.
      tensors: name -> shape and dtype, in the order of the files.
      values: the tensors themselves, or their bytes as uint8, in that order; one is in memory at a
        time.
      max_shard_bytes: the most bytes of data in one file. A larger tensor gets its own file.
      only: write only the files of these tensors (see `part_of`), and the index with the first one.
        The values of others are not read.
    """
    shards = _shards(tensors, max_shard_bytes)
    file_of: dict[str, str] = {}
    coming = iter(values)
    for i, names in enumerate(shards):
        name = WHOLE
        if len(shards) > 1:
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        file_of |= dict.fromkeys(names, name)
        if only is None or names[0] in only:
            write_file(folder / name, {n: tensors[n] for n in names}, coming)
        else:
            for _ in names:
                next(coming)
    if len(shards) > 1 and (only is None or shards[0][0] in only):
        size = sum(stored.bytes for stored in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(file_of.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(
    path: Path, tensors: Mapping[str, Stored], coming: Iterator[tuple[str, np.ndarray | None]]
) -> None:
    """Writes one safetensors file, taking the tensors in order from the iterator `coming`.

    The library's own writer makes files that only their owner can read.
    """
    with path.open("wb") as file:
        file.write(_header(tensors))
        for expected in tensors:
            found, value = next(coming)
            assert value is not None, found
            stored = tensors[expected]
            if value.dtype != np.uint8:
                assert stored_like(value.shape, value.dtype) == stored, (found, value.dtype, stored)
            assert (found, value.nbytes) == (expected, stored.bytes), (found, expected, stored)
            # As bytes, because Python's buffers do not support bfloat16.
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def stored_like(shape: Sequence[int], dtype: Any) -> Stored:
    """Makes a `Stored` from a shape and a numpy dtype."""
    name = next(name for name, known in DTYPES.items() if np.dtype(known) == np.dtype(dtype))
    return Stored(tuple(shape), name)


def _shards(tensors: Mapping[str, Stored], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, stored in tensors.items():
        if shards[-1] and size + stored.bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += stored.bytes
    return shards


def _header(tensors: Mapping[str, Stored]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires this
    offset = 0
    for name, stored in tensors.items():
        header[name] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "data_offsets": [offset, offset + stored.bytes],
        }
        offset += stored.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
