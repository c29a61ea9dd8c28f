"""Opens a model in a bucket: its small files are copied, its weights are read where they lie.

The copy has, in place of each safetensors file, a small file `NAME.in-bucket` that says where the
weights are, in which version, and what their header says. So the copy's digest changes with the
weights, and each process reads no more of them than its own shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from selm_jax.shell import bucket_files
from selm_jax.shell.bucket_files import digest_of, files_at
from selm_jax.shell.json_file import JsonFileError, read_object
from selm_jax.shell.storage import Conflict, Entry, Store

_SUFFIX = ".in-bucket"
_FORMAT = 1  # of the small files; it is part of the copy's name
_LONGEST_HEADER = 100 << 20  # bytes; the safetensors library refuses longer ones


class BucketModelError(ValueError):
    """A model in a bucket is not there, is damaged, or was replaced while it was read."""


class InBucket:
    """The bytes of a safetensors file in a bucket: `file[start:stop]` reads these as uint8.

    Attributes:
      filename: the path that the file would have if it were here.
      header: the file's header.
      start: where the data begins.
    """

    def __init__(self, filename: Path):
        small = _small(filename)
        try:
            told = read_object(small)
            self._store, self._key = Store.at(told["store"]), told["key"]
            self._version, self.start = told["version"], told["start"]
            self.header: dict[str, Any] = told["header"]
        except (JsonFileError, KeyError) as e:
            raise BucketModelError(
                f"{small} is damaged ({e!r}). Delete {small.parent} and start again"
            ) from e
        self.filename = filename

    def __getitem__(self, span: slice) -> np.ndarray:
        try:
            got = self._store.read_range(self._key, span.start, span.stop, version=self._version)
        except (Conflict, FileNotFoundError) as e:
            raise BucketModelError(
                f"{self._store.url}/{self._key} was replaced or deleted while this model was in "
                "use. Start again, with the model as it is now"
            ) from e
        return np.frombuffer(got, np.uint8)


def is_there(file: Path) -> bool:
    """Says whether a file is in a model's folder or, if that is a bucket's copy, in the bucket."""
    return file.is_file() or is_elsewhere(file)


def is_elsewhere(file: Path) -> bool:
    """Returns whether the bytes of a safetensors file are in a bucket."""
    return not file.is_file() and _small(file).is_file()


def copied(
    url: str, wanted: Callable[[Iterable[str]], Iterable[str]], cache: Path, whole: bool
) -> tuple[Path, str]:
    """Copies a model from a bucket into the cache; its weights too if `whole`.

    Args:
      url: the model's folder, such as `gs://bucket/model`.
      wanted: chooses the files that a model needs from the names of all.
      cache: the folder for copies. A copy's name has the digest, so it is made once.

    Returns:
      The copy, and the SHA-256 of the names, sizes and versions of the model's files.

    Raises:
      StorageError: the bucket cannot be used.
      BucketModelError: there is no such folder, or the header of a file is damaged.
    """
    store, files = files_at(url, wanted)
    if store.url != url.rstrip("/") or not files:
        raise BucketModelError(
            f"{url}: there is no model in this folder of the bucket. Correct the name, or copy a "
            "Hugging Face folder there"
        )
    how = {} if whole else {"copy": _copy, "kind": f"v{_FORMAT}"}
    return bucket_files.copied(store, files, cache, **how), digest_of(files)


def _copy(store: Store, entry: Entry, to: Path) -> None:
    """Copies a file; for weights, it writes the small file that stands for them."""
    if to.suffix != ".safetensors":
        bucket_files.whole(store, entry, to)
        return
    told = {"store": store.url, "key": entry.key, "version": entry.version}
    text = json.dumps(told | _header(store, entry), indent=1)
    _small(to).write_text(text + "\n", encoding="utf-8")


def _header(store: Store, entry: Entry) -> dict[str, Any]:
    """The `header` of a safetensors file, and the `start` of its data."""
    wrong = f"{store.url}/{entry.key} is damaged, cut off, or no safetensors file. Copy it again"
    length = int.from_bytes(store.read_range(entry.key, 0, min(8, entry.size)), "little")
    start = 8 + length
    if not 2 <= length <= min(_LONGEST_HEADER, entry.size - 8):
        raise BucketModelError(wrong)
    try:
        header = json.loads(store.read_range(entry.key, 8, start))
        ends = [t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise BucketModelError(f"{wrong} ({e!r})") from e
    if start + max(ends, default=0) != entry.size:
        raise BucketModelError(wrong)
    return {"start": start, "header": header}


def _small(file: Path) -> Path:
    return file.with_name(file.name + _SUFFIX)
