"""Copies files from a bucket into the cache, once for each version of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from selm_jax.shell.leftovers import INCOMING, sweep
from selm_jax.shell.storage import Conflict, Entry, Store


def files_at(
    url: str, wanted: Callable[[Iterable[str]], Iterable[str]]
) -> tuple[Store, dict[str, Entry]]:
    """Lists the wanted files of a folder in a bucket or, if the url is that of a file, this one.

    Returns:
      The place of the files, and the files by name, in order; none if nothing is there.
    """
    store = Store.at(url)
    if there := store.list():
        return store, {name: there[name] for name in sorted(wanted(there))}
    folder, _, name = store.url.rpartition("/")
    if folder.endswith("/"):  # the bucket itself
        return store, {}
    store = Store.at(folder)
    entry = store.head(name)
    return store, {} if entry is None else {name: entry}


def digest_of(files: Mapping[str, Entry]) -> str:
    """The SHA-256 of names, sizes and versions of files."""
    lines = (f"{name}\0{entry.size} {entry.version}\n" for name, entry in files.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def whole(store: Store, entry: Entry, to: Path) -> None:
    """Copies a file.

    Raises:
      Conflict: it is not any more what it was when it was listed.
    """
    if store.fetch(entry.key, to).version != entry.version:
        raise Conflict(f"{store.url}/{entry.key} was just replaced. Start again")


def copied(
    store: Store,
    files: Mapping[str, Entry],
    cache: Path,
    copy: Callable[[Store, Entry, Path], None] = whole,
    kind: str = "whole",
) -> Path:
    """Copies files into a folder of the cache, if they are not there yet, and returns the folder.

    Args:
      copy: makes the local file of an object.
      kind: another word for another `copy`; it is part of the folder's name.
    """
    of = hashlib.sha256(f"{store.url} {digest_of(files)}".encode()).hexdigest()[:16]
    out = cache / f"{store.url.rsplit('/', 1)[-1]}-{of}-{kind}"
    sweep(cache)
    if not out.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=INCOMING) as work:
            for name, entry in files.items():
                to = Path(work, "files", name)
                to.parent.mkdir(parents=True, exist_ok=True)
                copy(store, entry, to)
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(Path(work, "files"), out)
    return out
