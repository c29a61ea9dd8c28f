"""Computes digests of files and folders, by which a run recognises its own results."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from selm_jax.shell import mirror as mirrors
from selm_jax.shell.paths import is_leftover
from selm_jax.shell.sealed import sha256

CARD = "README.md"
"""The model card of a model folder. It is completed after the evaluation: no digest covers it."""


def digest(path: Path, without: tuple[str, ...] = ()) -> str:
    """SHA-256, in hex, of a file, or of a folder's files and their names, except `without`."""
    path = Path(path)
    mirror = mirrors.of(path)
    if path.is_dir() or (mirror is not None and mirror.below(path) not in ([], [mirror.key(path)])):
        lines = "".join(f"{name} {sha}\n" for name, sha in digests(path, without).items())
        return hashlib.sha256(lines.encode()).hexdigest()
    if mirror is not None and (known := mirror.digest(path)) is not None:
        return known
    stat = path.stat()
    return _file_digest(path, stat.st_size, stat.st_mtime_ns)


def digests(folder: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    """SHA-256 of each file in a folder, by relative path. Files such as .DS_Store do not count."""
    if (mirror := mirrors.of(folder)) is not None:
        if (known := mirror.digests(folder)) is not None:
            return {name: sha for name, sha in known.items() if name not in without}
        mirror.need(folder)
    files = (p for p in folder.rglob("*") if p.is_file() and not is_leftover(p.name))
    names = {file.relative_to(folder).as_posix(): file for file in sorted(files)}
    return {name: digest(file) for name, file in names.items() if name not in without}


@lru_cache(maxsize=4096)  # by size and mtime: a model is read once per run, not once per stage
def _file_digest(path: Path, size: int, changed: int) -> str:  # noqa: ARG001 (keys of the cache)
    return sha256(path)
