"""The only way a stage leaves a file behind: whole or not at all, and with a digest.

A file is written beside its name, flushed to disk, and renamed. A folder likewise. What a stage
did stands in `stage.json`: the digests of its inputs and outputs, its settings, counts and seconds.
A stage is done when its entry is there and still true. What a stage that was stopped goes on from has
its SHA-256 beside it (`selm_jax.shell.parts`) or in it (`write_sealed`), and is refused when that is another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selm_jax.shell import jsonl
from selm_jax.shell.json_file import JsonFileError, read_object
from selm_jax.shell.paths import check_file, is_leftover
from selm_jax.shell.sealed import is_sealed, seal, sha256, unsealed
from selm_jax.shell.words import some


class ArtifactError(RuntimeError):
    """A run folder that cannot be gone on with. The message says what to do."""


_PARTIAL = ".selm-partial"  # a name that is nobody else's: what has it is deleted
_PUT_BACK = "Put it back from a copy"


@contextlib.contextmanager
def whole(path: Path, *, replaces_folder: bool = False) -> Iterator[Path]:
    """Yields a path to write a file or a folder to; on success it becomes `path`.

    If the body raises, nothing stays. If the process dies, the leftover has the suffix
    `.selm-partial` and the next attempt removes it. A link to a file stays a link.

    Args:
      replaces_folder: what is at `path` is the caller's own, also if it is a folder. By default a
        folder stays as it is: a path that a person gave may lead to anything.

    Raises:
      PathError: a file cannot be written there; see `paths.check_file`.
    """
    if not replaces_folder:
        check_file(path)
        path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + _PARTIAL)
    remove(partial)
    try:
        yield partial
        flush(partial)
        if replaces_folder and path.is_dir():
            remove(path)
        os.replace(partial, path)
        remove(partial)  # still there if both were links to one file: then nothing was renamed
        flush_folder(path.parent)
    except BaseException:
        remove(partial)
        raise


def remove(path: Path) -> None:
    """Deletes a file or a folder, if it is there. Of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link(at: Path, to: Path) -> None:
    """Makes `at` a link to `to`, whatever it was a link to."""
    at.parent.mkdir(parents=True, exist_ok=True)
    partial = at.with_name(f"{at.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(to)
    os.replace(partial, at)


def wait_for(paths: Iterable[Path], seconds: float = 120) -> None:
    """Returns when all paths are there: a shared folder shows another host's files with delay.

    Raises:
      ArtifactError: one is not, after so many seconds.
    """
    until = time.monotonic() + seconds
    for path in paths:
        while not path.exists():
            if time.monotonic() > until:
                raise ArtifactError(
                    f"{path}: another process of this run wrote it, and it is not to be seen here "
                    f"after {seconds:.0f} s. All hosts have to see one run folder (docs/run.md)"
                )
            time.sleep(0.1)


def write_text(path: Path, text: str) -> None:
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """JSON that carries its digest."""
    write_json(path, seal(value))


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` has written.

    Raises:
      FileNotFoundError: there is no such file.
      ArtifactError: it is not as it was written.
    """
    value = _object(path)
    if not is_sealed(value):
        raise ArtifactError(
            f"{path}: this file is not as it was written (its SHA-256 is another). {_PUT_BACK}"
        )
    return unsealed(value)


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run. ArtifactError if it holds something else."""
    try:
        return read_object(path)
    except JsonFileError as e:
        what = str(e).removeprefix(f"{path} ")
        raise ArtifactError(f"{path}: this file {what}. {_PUT_BACK}") from e


def write_table(path: Path, table: pa.Table) -> None:
    with whole(path) as partial:
        # Absolute: a path such as `a:b` would be taken for an address.
        where = partial.absolute()
        pq.write_table(table, where, compression="zstd", write_page_checksum=True)


def read_table(path: Path) -> pa.Table:
    """A table that `write_table` has written, with the checksum of every page compared.

    Raises:
      FileNotFoundError: there is no such file.
      ArtifactError: it cannot be read.
    """
    try:
        return pq.read_table(path.absolute(), page_checksum_verification=True)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as e:
        raise ArtifactError(
            f"{path}: this table is damaged ({e}). Put it back from a copy, or remove the stage that "
            f"wrote it from {path.parent / 'stage.json'} to do that stage again"
        ) from e


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files and their names. In hex."""
    path = Path(path)
    if path.is_dir():
        lines = "".join(f"{name} {sha}\n" for name, sha in digests(path).items())
        return hashlib.sha256(lines.encode()).hexdigest()
    stat = path.stat()
    return _file_digest(path, stat.st_size, stat.st_mtime_ns)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a folder, by its name there. What the system leaves in folders, such as
    .DS_Store, is none of its files."""
    files = (p for p in folder.rglob("*") if p.is_file() and not is_leftover(p.name))
    return {file.relative_to(folder).as_posix(): digest(file) for file in sorted(files)}


@lru_cache(maxsize=4096)  # by size and time of change: a model is read once a run, not once a stage
def _file_digest(path: Path, size: int, changed: int) -> str:  # noqa: ARG001 (keys of the cache)
    return sha256(path)


def iterations(run: Path) -> dict[int, Path]:
    """The folders of a run's iterations, in order. A copy, such as `iteration_1.bak`, is none."""
    found = ((re.fullmatch(r"iteration_(\d+)", path.name), path) for path in run.iterdir())
    return dict(sorted((int(name[1]), path) for name, path in found if name and path.is_dir()))


FORMAT = 2  # of stage.json's entries


class Stages:
    """The stages of one iteration, as `stage.json` tells them."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "stage.json"

    def read(self) -> dict[str, Any]:
        """The entries by stage. An entry may be taken out by hand; none may be changed.

        Raises:
          ArtifactError: an entry is not as it was written.
        """
        if not self.file.exists():
            return {}
        entries = _object(self.file)
        changed = [name for name, entry in entries.items() if not is_sealed(entry, name)]
        if changed:
            raise ArtifactError(
                f"{self.file}: the entry of stage {changed[0]!r} is not as it was written (its "
                f"SHA-256 is another). {_PUT_BACK}, or remove the entry to do that stage again"
            )
        return entries

    def digest(self, name: str) -> str:
        """The digest of a file or folder of this iteration.

        Raises:
          ArtifactError: it is not as the stage that wrote it has left it.
        """
        now = digest(self.folder / name)
        for stage, entry in self.read().items():
            if entry.get("outputs", {}).get(name, now) != now:
                what = _differences(self.folder / name, entry.get("files", {}).get(name))
                raise ArtifactError(
                    f"{self.folder / name}: it is not what stage {stage!r} wrote{what}. {_PUT_BACK}, "
                    f"or remove {stage!r} from {self.file} to do that stage again"
                )
        return now

    def is_done(self, stage: str, inputs: Mapping[str, str], settings: Mapping[str, Any]) -> bool:
        """Whether the stage finished with these inputs and settings and its outputs are intact.

        Raises:
          ArtifactError: it finished, or began, with others. Changed settings never resume a stage.
        """
        entry = self.read().get(stage)
        if entry is None:
            return False
        where = f"{self.folder}, stage {stage!r}"
        again = f"To redo it and what follows, remove {stage!r} from {self.file}; to keep it, "
        redo = again + "set the setting back, or give the changed experiment another `output`"
        restore = again + "put its files back as they were"
        keys = set(settings) | set(entry["settings"])
        if "format" not in entry:  # versions before this one kept fewer settings and inputs
            keys &= set(settings) & set(entry["settings"])
            inputs = {name: now for name, now in inputs.items() if name in entry["inputs"]}
        for key in sorted(keys):
            before, now = entry["settings"].get(key), settings.get(key)
            if before != now:
                raise ArtifactError(f"{where}: {key} was {before!r} and is now {now!r}. {redo}")
        for name, now in inputs.items():
            if entry["inputs"].get(name) != now:
                raise ArtifactError(f"{where}: its input {name} has changed since it ran. {redo}")
        if not entry["done"]:
            return False
        for name, before in entry["outputs"].items():
            path = self.folder / name
            if not path.exists():
                raise ArtifactError(f"{where}: its output {path} is missing. {restore}")
            if digest(path) != before:
                what = _differences(path, entry.get("files", {}).get(name))
                raise ArtifactError(
                    f"{where}: its output {path} is not what it wrote{what}. {restore}"
                )
        return True

    def begin(self, stage: str, inputs: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        """Writes down what the stage is about to work with, so that a resumed one cannot differ."""
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
        """
        Args:
          shared: the entry of the `Store` that the outputs were taken from.
          logged: the digest of what the stage has written into metrics.jsonl.
        """
        self._put(
            stage,
            {
                "format": FORMAT,
                "done": True,
                "inputs": inputs,
                "settings": settings,
                "outputs": {name: digest(path) for name, path in outputs.items()},
                "files": {name: digests(path) for name, path in outputs.items() if path.is_dir()},
                "counts": counts,
                "seconds": round(seconds, 3),
                **({"shared": shared} if shared else {}),
                **({"logged": logged} if logged else {}),
            },
        )

    def _put(self, stage: str, entry: dict[str, Any]) -> None:
        write_json(self.file, self.read() | {stage: seal(entry, stage)})


def _differences(folder: Path, before: Mapping[str, str] | None) -> str:
    """Which files of a folder are others than before, as the end of a sentence."""
    if before is None or not folder.is_dir():
        return ""
    now = digests(folder)
    kinds = {
        "new": [name for name in now if name not in before],
        "missing": [name for name in before if name not in now],
        "changed": [name for name in before if now.get(name, before[name]) != before[name]],
    }
    told = [f"{kind}: {some(names)}" for kind, names in kinds.items() if names]
    return f" ({'; '.join(told)})" if told else ""


def read_lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines; none if there is no such file.

    Raises:
      ArtifactError: a line is not JSON.
    """
    if not path.exists():
        return []
    found = []
    for line in jsonl.lines(path.read_bytes()):
        try:
            found.append(line.value())
        except jsonl.JsonError as error:
            raise _no_json(path, line, error) from error
    return found


def _no_json(path: Path, line: jsonl.Line, error: jsonl.JsonError) -> ArtifactError:
    return ArtifactError(
        f"{path}, line {line.number}: not JSON: {error}. {_PUT_BACK}; or take the line away, and the "
        "stage that wrote it out of its iteration's stage.json to do that stage again"
    )


def rewrite_lines(path: Path, keep: Callable[[dict[str, Any]], bool] = lambda line: True) -> bool:
    """Keeps the JSON lines that satisfy `keep`; a torn last line goes too. Returns whether the file
    was another before.

    Raises:
      ArtifactError: another line is not JSON.
    """
    if not path.exists():
        return False
    kept = []
    for line in jsonl.lines(path.read_bytes()):
        try:
            if keep(line.value()):
                kept.append(line.text)
        except jsonl.JsonError as error:
            if line.ended:  # or else it was torn by a kill: the step that wrote it runs again
                raise _no_json(path, line, error) from error
    text = "".join(line + "\n" for line in kept)
    if text.encode() == path.read_bytes():
        return False
    write_text(path, text)
    return True


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Adds one JSON line."""
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(value, ensure_ascii=False) + "\n")


def flush(path: Path) -> None:
    """Has the system write a file, or a folder's files, to disk."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb") as f:
                os.fsync(f.fileno())


def flush_folder(folder: Path) -> None:
    """Has the system write the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
