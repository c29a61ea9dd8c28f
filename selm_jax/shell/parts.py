"""The parts of a table that a stage writes one after the other, so that a stopped one goes on.

Beside each part stands its SHA-256, which is compared before the part is taken. When the stage is done,
`stage.json` has the digest of them all.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from selm_jax.shell.artifacts import ArtifactError, write_table, write_text
from selm_jax.shell.sealed import sha256


def files(folder: Path, count: int) -> list[Path]:
    """The files of a table in so many parts: parts of another number are not taken for these."""
    return [folder / f"part-{part:05d}-of-{count:05d}.parquet" for part in range(count)]


def write(file: Path, table: pa.Table) -> None:
    """Writes one part, and its SHA-256 beside it, as `sha256sum --check` reads it.

    The part is there when both files are: if the process dies between them, it is made again.
    """
    beside = _beside(file)
    beside.unlink(missing_ok=True)
    write_table(file, table)
    write_text(beside, _told(file))


def is_there(file: Path) -> bool:
    """Whether a part is there.

    Raises:
      ArtifactError: it is there, and not as it was written.
    """
    beside = _beside(file)
    if not (file.exists() and beside.exists()):
        return False
    if beside.read_bytes() != _told(file).encode():
        raise ArtifactError(
            f"{file}: this part is not as it was written: its SHA-256 is not the one in "
            f"{beside.name}. Delete it: the same command makes this part again"
        )
    return True


def _beside(file: Path) -> Path:
    """Hidden: who reads the folder as one table passes over it."""
    return file.with_name(f".{file.name}.sha256")


def _told(file: Path) -> str:
    return f"{sha256(file)}  {file.name}\n"
