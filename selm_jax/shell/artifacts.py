"""Writes a stage's files completely or not at all, with their digests.

A file or a folder is written under a temporary name, flushed to disk, and renamed. `stage.json`
records what each stage did: the digests of its inputs and outputs, its settings, counts and
seconds. A stage is done if it has an entry there that still matches the files. The files from which
a stopped stage resumes carry their SHA-256 beside them (`selm_jax.shell.parts`) or inside
(`write_sealed`), and are refused if it does not match.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selm_jax.shell import mirror as mirrors
from selm_jax.shell.digests import CARD, digest, digests
from selm_jax.shell.json_file import JsonFileError, read_object
from selm_jax.shell.paths import check_file
from selm_jax.shell.sealed import is_sealed, seal, unsealed
from selm_jax.shell.words import redo, some


class ArtifactError(RuntimeError):
    """A run folder cannot be continued. The message says what to do."""


_PARTIAL = ".selm-partial"  # no other program uses this suffix: what has it is deleted
_PUT_BACK = "Restore it from a copy"


@contextlib.contextmanager
def whole(path: Path, *, replaces_folder: bool = False) -> Iterator[Path]:
    """Yields a temporary path to write a file or a folder to; on success it becomes `path`.

    If the body raises, nothing is left behind. If the process dies, the leftover has the suffix
    `.selm-partial` and the next attempt removes it. A link to a file stays a link.

    Args:
      replaces_folder: also replace a folder at `path`, which the caller must own. By default a
        folder is never replaced: a path that a person gave may lead to anything.

    Raises:
      PathError: a file cannot be written there; see `paths.check_file`.
    """
    if not replaces_folder:
        check_file(path)
        path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + _PARTIAL)
    _unlink(partial)
    try:
        yield partial
        flush(partial)
        if replaces_folder and path.is_dir():
            _unlink(path)
        os.replace(partial, path)
        _unlink(partial)  # still there if both were links to one file: then nothing was renamed
        flush_folder(path.parent)
    except BaseException:
        _unlink(partial)
        raise
    within = any(folder.name.endswith(_PARTIAL) for folder in path.parents)
    if (mirror := mirrors.of(path)) is not None and not within:  # else the folder will be put
        mirror.put(path)


def remove(path: Path) -> None:
    """Deletes a file or a folder if it exists. For a link, only the link itself is deleted."""
    if (mirror := mirrors.of(path)) is not None:
        mirror.removed(path)
    _unlink(path)


def follow_removal(path: Path) -> None:
    """Deletes the local copy of what another process has removed from the bucket, if any."""
    if (mirror := mirrors.of(path)) is not None:
        mirror.refresh(path)


def _unlink(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def keep(file: Path) -> None:
    """Makes what was appended to a file, or written by others, safe: on the disk or in the bucket.

    What is in a bucket is then what a killed run continues with.
    """
    flush(file)
    if (mirror := mirrors.of(file)) is not None and file.exists():
        mirror.put(file)


def link(at: Path, to: Path) -> None:
    """Makes `at` a symbolic link to `to`, replacing an older link."""
    at.parent.mkdir(parents=True, exist_ok=True)
    partial = at.with_name(f"{at.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(to)
    os.replace(partial, at)


def wait_for(paths: Iterable[Path], seconds: float = 120) -> None:
    """Waits until all paths exist: a shared folder shows another host's files with a delay.

    From a bucket, the files of other processes are fetched; models and checkpoints only by
    `mirror.need`.

    Raises:
      ArtifactError: a path still does not exist after this many seconds.
    """
    until = time.monotonic() + seconds
    for path in paths:
        while not _shown(path):
            if time.monotonic() > until:
                advice = (
                    "All hosts must share the run folder (docs/run.md)"
                    if mirrors.of(path) is None
                    else "If the other process is still running, stop it. Then start all again"
                )
                raise ArtifactError(
                    f"{path} was written by another process but is not visible on this host after "
                    f"{seconds:.0f} s. {advice}"
                )
            time.sleep(0.1)


def _shown(path: Path) -> bool:
    if (mirror := mirrors.of(path)) is not None:
        mirror.refresh(path)
    return mirrors.exists(path)


def write_text(path: Path, text: str) -> None:
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file that contains a digest of its own content."""
    write_json(path, seal(value))


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads JSON that `write_sealed` wrote, and checks its digest.

    Raises:
      FileNotFoundError: there is no such file.
      ArtifactError: the file has changed since it was written.
    """
    value = _object(path)
    if not is_sealed(value):
        raise ArtifactError(
            f"{path}: this file has changed since it was written (its SHA-256 does not match). "
            f"{_PUT_BACK}"
        )
    return unsealed(value)


def _object(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file of a run; raises ArtifactError if there is no such object."""
    try:
        return read_object(path)
    except JsonFileError as e:
        what = str(e).removeprefix(f"{path} ")
        raise ArtifactError(f"{path}: this file {what}. {_PUT_BACK}") from e


def write_table(path: Path, table: pa.Table) -> None:
    with whole(path) as partial:
        # Absolute: pyarrow would take a path such as `a:b` for a URI.
        where = partial.absolute()
        pq.write_table(table, where, compression="zstd", write_page_checksum=True)


def read_table(path: Path) -> pa.Table:
    """Reads a table that `write_table` wrote, and verifies the checksum of every page.

    Raises:
      FileNotFoundError: there is no such file.
      ArtifactError: the table is damaged.
    """
    try:
        return pq.read_table(path.absolute(), page_checksum_verification=True)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as e:
        raise ArtifactError(
            f"{path}: this table is damaged ({e}). {_PUT_BACK}, or run the stage that "
            f"wrote it again: {redo(path.parent, 'STAGE')}"
        ) from e


def iterations(run: Path) -> dict[int, Path]:
    """The folders of a run's iterations, in order. A copy such as `iteration_1.bak` is ignored."""
    found = ((re.fullmatch(r"iteration_(\d+)", path.name), path) for path in run.iterdir())
    return dict(sorted((int(name[1]), path) for name, path in found if name and path.is_dir()))


FORMAT = 2  # of stage.json's entries


class Stages:
    """The stages of one iteration, as recorded in `stage.json`."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "stage.json"

    def read(self) -> dict[str, Any]:
        """The entries of stage.json, by stage. The user may delete an entry, but not change one.

        Raises:
          ArtifactError: an entry has changed since it was written.
        """
        if not self.file.exists():
            return {}
        entries = _object(self.file)
        changed = [name for name, entry in entries.items() if not is_sealed(entry, name)]
        if changed:
            raise ArtifactError(
                f"{self.file}: the entry of stage {changed[0]!r} has changed since it was written "
                f"(its SHA-256 does not match). {_PUT_BACK}, or run that stage again: "
                f"{redo(self.folder, changed[0])}"
            )
        return entries

    def digest(self, name: str) -> str:
        """The digest of a file or folder of this iteration.

        Raises:
          ArtifactError: the file or folder has changed since a stage wrote it.
        """
        path = self.folder / name
        for stage, entry in self.read().items():
            if name in entry.get("gone", ()):
                return entry["outputs"][name]
            if name in entry.get("outputs", {}):
                now = digest(path, _unsealed(entry, name))
                if entry["outputs"][name] != now:
                    what = _differences(path, entry, name)
                    raise ArtifactError(
                        f"{path} has changed since stage {stage!r} wrote it{what}. {_PUT_BACK}, or "
                        f"run that stage again: {redo(self.folder, stage)}"
                    )
                return now
        return digest(path)

    def is_done(self, stage: str, inputs: Mapping[str, str], settings: Mapping[str, Any]) -> bool:
        """Says whether the stage finished with these inputs and settings and intact outputs.

        Raises:
          ArtifactError: the stage started with other inputs or settings, or an output changed.
        """
        entry = self.read().get(stage)
        if entry is None:
            return False
        where = f"{self.folder}, stage {stage!r}"
        again = f"To run this stage and the later ones again: {redo(self.folder, stage)}; to keep "
        undo = again + "it, undo the change, or give the changed experiment another `output`"
        restore = again + "it, restore the original files"
        keys = set(settings) | set(entry["settings"])
        if "format" not in entry:  # earlier versions recorded fewer settings and inputs
            keys &= set(settings) & set(entry["settings"])
            inputs = {name: now for name, now in inputs.items() if name in entry["inputs"]}
        for key in sorted(keys):
            before, now = entry["settings"].get(key), settings.get(key)
            if before != now:
                raise ArtifactError(f"{where}: {key} was {before!r} and is now {now!r}. {undo}")
        for name, now in inputs.items():
            if entry["inputs"].get(name) != now:
                raise ArtifactError(f"{where}: its input {name} has changed since it ran. {undo}")
        if not entry["done"]:
            return False
        for name, before in entry["outputs"].items():
            path = self.folder / name
            if name in entry.get("gone", ()):
                continue
            if not mirrors.exists(path):
                raise ArtifactError(f"{where}: its output {path} is missing. {restore}")
            if digest(path, _unsealed(entry, name)) != before:
                what = _differences(path, entry, name)
                raise ArtifactError(
                    f"{where}: its output {path} is not what it wrote{what}. {restore}"
                )
        return True

    def gone(self) -> set[str]:
        """The outputs that were deleted on purpose, by `let_go`."""
        return {name for entry in self.read().values() for name in entry.get("gone", ())}

    def let_go(self, stage: str, name: str) -> None:
        """Deletes an output that no later stage needs. The stage still counts as done."""
        entry = self.read()[stage]
        if name not in entry.get("gone", ()):
            self._put(stage, unsealed(entry) | {"gone": [*entry.get("gone", ()), name]})
        remove(self.folder / name)  # after a kill in the middle of this it is deleted once more

    def may_complete(self, stage: str, name: str) -> bool:
        """Says whether the stage is done and the card in its output folder may be replaced."""
        entry = self.read().get(stage, {})
        return bool(entry.get("done")) and CARD in _unsealed(entry, name)

    def begin(self, stage: str, inputs: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        """Records the inputs and settings of a stage that begins, to compare them if it resumes."""
        self._put(stage, {"format": FORMAT, "done": False, "inputs": inputs, "settings": settings})

    def finish(
        self,
        stage: str,
        inputs: Mapping[str, str],
        settings: Mapping[str, Any],
        outputs: Mapping[str, Path],
        counts: Mapping[str, Any],
        seconds: float,
        shared: str | None = None,
        logged: str | None = None,
    ) -> None:
        """Records that the stage is done, with the digests of its outputs.

        Args:
          shared: the entry of the `SharedStages` that the outputs were taken from.
          logged: the digest of the lines that the stage wrote into metrics.jsonl.
        """
        self._put(
            stage,
            {
                "format": FORMAT,
                "done": True,
                "inputs": inputs,
                "settings": settings,
                "outputs": {name: digest(path, (CARD,)) for name, path in outputs.items()},
                "files": {n: digests(p, (CARD,)) for n, p in outputs.items() if p.is_dir()},
                "counts": counts,
                "seconds": round(seconds, 3),
                **({"shared": shared} if shared else {}),
                **({"logged": logged} if logged else {}),
            },
        )

    def _put(self, stage: str, entry: dict[str, Any]) -> None:
        write_json(self.file, self.read() | {stage: seal(entry, stage)})


def _unsealed(entry: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The files of an output folder that may change: the model card, unless its digest was kept."""
    files = entry.get("files", {}).get(name)
    return () if files is None or CARD in files else (CARD,)


def _differences(folder: Path, entry: Mapping[str, Any], name: str) -> str:
    """Which files of a folder are new, missing or changed, in brackets for an error message."""
    before = entry.get("files", {}).get(name)
    if before is None or not folder.is_dir():
        return ""
    now = digests(folder, _unsealed(entry, name))
    kinds = {
        "new": [name for name in now if name not in before],
        "missing": [name for name in before if name not in now],
        "changed": [name for name in before if now.get(name, before[name]) != before[name]],
    }
    told = [f"{kind}: {some(names)}" for kind, names in kinds.items() if names]
    return f" ({'; '.join(told)})" if told else ""


def flush(path: Path) -> None:
    """Flushes a file, or all files of a folder, to disk (fsync)."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb") as f:
                os.fsync(f.fileno())


def flush_folder(folder: Path) -> None:
    """Flushes a folder itself to disk (fsync), so that a renamed file survives a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
