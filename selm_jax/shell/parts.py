"""Writes a stage's tables part by part, so that a stopped stage can resume.

Each part has a file beside it with its SHA-256, which is checked before the part is used. When the
stage is done, `stage.json` has the digest of the whole folder.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from selm_jax.shell.artifacts import ArtifactError, remove, write_table, write_text
from selm_jax.shell.sealed import sha256


def files(folder: Path, count: int) -> list[Path]:
    """The files of a table in `count` parts; the names contain the count."""
    return [folder / f"part-{part:05d}-of-{count:05d}.parquet" for part in range(count)]


def write(file: Path, table: pa.Table) -> None:
    """Writes one part of a table, and a file with its SHA-256 for `sha256sum --check`.

    A part counts as written if both files exist: if the process dies between them, it is redone.
    """
    beside = _beside(file)
    remove(beside)
    write_table(file, table)
    write_text(beside, _told(file))


def is_there(file: Path) -> bool:
    """Returns whether a part has been written.

    Raises:
      ArtifactError: the part has changed since it was written.
    """
    beside = _beside(file)
    if not (file.exists() and beside.exists()):
        return False
    if beside.read_bytes() != _told(file).encode():
        raise ArtifactError(
            f"{file}: this part has changed since it was written: its SHA-256 is not the one in "
            f"{beside.name}. Delete the part and run the same command to make it again"
        )
    return True


def _beside(file: Path) -> Path:
    """The file with a part's digest. It is hidden, so that table readers ignore it."""
    return file.with_name(f".{file.name}.sha256")


def _told(file: Path) -> str:
    return f"{sha256(file)}  {file.name}\n"
