"""Lets one process at a time use a run folder, on a disk or in a bucket."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from selm_jax.shell import bucket_lock, lock
from selm_jax.shell import mirror as mirrors
from selm_jax.shell.paths import MARK, PathError, mark
from selm_jax.shell.words import some


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[str | None]:
    """Locks a run folder for this process while the body runs.

    The mirror of a folder in a bucket is then equal to the bucket, and this yields the lease's id.

    Raises:
      ArtifactError: another process is using the folder; see `lock.only_one`.
      PathError: the folder contains something that this program did not make.
    """
    mirror = mirrors.of(folder)
    with lock.only_one(folder) if mirror is None else _only_one_in_bucket(mirror) as lease:
        yield lease


def as_another_of_its_run(folder: Path, lease: str | None) -> AbstractContextManager[None]:
    """Lets a process write to a bucket while the first one of its run holds this lease there."""
    mirror = mirrors.of(folder)
    if mirror is None or lease is None:
        return contextlib.nullcontext()
    return bucket_lock.followed(mirror.store, lease)


def holder(folder: Path) -> dict[str, Any] | None:
    """The `process` and `host` that use a run folder; None if no process does."""
    mirror = mirrors.of(folder)
    return lock.holder(folder) if mirror is None else bucket_lock.holder(mirror.store)


@contextlib.contextmanager
def _only_one_in_bucket(mirror: mirrors.Mirror) -> Iterator[str]:
    found = sorted(mirror.everything())
    if found and MARK not in found:
        raise PathError(
            f"{mirror.url} is not empty ({some(found)}) and was not made by this program. "
            "Nothing was written. Choose a folder that is new or empty"
        )
    with bucket_lock.held(mirror.store) as lease:
        mirror.refresh()
        if MARK not in mirror.there:
            mark(mirror.folder)
            mirror.put(mirror.folder / MARK)
        yield lease
