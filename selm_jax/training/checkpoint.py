"""Checkpoints: saves the training state with orbax so that training can resume exactly.

Every process writes its own shards, in the background, while the next updates are computed. When
all processes have finished, the checkpoint's folder gets its name, the number of its step; before
that, nobody reads the folder. It contains `whole.json`: the size and SHA-256 of each file, the
digest of the model that the iteration started from (the checkpoint is only valid for that model),
and the digest of the metrics logged until then.

Every process hashes the files that it has written, also in the background; the first process hashes
the files that belong to none. When a checkpoint is read, the processes hash equal shares of it. So
every byte is hashed once on writing and once on reading, however many hosts there are
(`selm_jax.shell.sealed` says what that costs).

If the run is in a bucket, each process writes into a folder of its own and puts the files that it
has hashed; and it fetches, and hashes, only the files that its own shards are in.

The order of the data is a function of the step, so there is nothing else to save. After the last
update only the parameters are kept, for the export.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from selm_jax.models.decoder import Params
from selm_jax.parallel import multihost
from selm_jax.shell import artifacts
from selm_jax.shell import mirror as mirrors
from selm_jax.shell.paths import cache_root
from selm_jax.shell.sealed import seal, sha256, sha256_of
from selm_jax.shell.storage_backend import StorageError
from selm_jax.training.chunks import chunks, small
from selm_jax.training.state import TrainState

_FINAL = "final"
_WHOLE = "whole.json"
_SPECIAL = frozenset("*?[]\\")
_LONGEST_SAVE = 4 * 60 * 60  # seconds; who is stuck is found by `parallel.watch`
_UNNAMED = ".orbax-checkpoint-tmp"  # orbax adds this to a name until everything is written
# Without a common folder each process writes everything that it has to say into its own, and no
# process merges the others' databases: the files of all, taken together, are the checkpoint.
_IN_OWN_FOLDER: dict[str, Any] = {
    "multiprocessing_options": ocp.options.MultiprocessingOptions(primary_host=None),
    "use_ocdbt": False,
}
# What it says about that is as it should be.
logging.getLogger("absl").addFilter(
    lambda record: not any(part in record.getMessage() for part in _AS_IT_SHOULD_BE)
)
_AS_IT_SHOULD_BE = (
    "Global object size logging disabled for `primary_host=None`",
    "Skipping merge of OCDBT checkpoints: No per-process OCDBT checkpoint subdirs",
)
# Orbax writes these files last and with the time in them; nothing is restored from them.
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


class Checkpoints:
    """The checkpoints of one iteration, each in a folder named after its step, or `final`.

    If there are several processes, all call the same methods in the same order.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start: str = "",
        keep: int = 1,
        logged: Callable[[int], str] = lambda step: "",
    ):
        """Opens the checkpoints in a folder, which need not exist yet.

        Args:
          folder: where the checkpoints are stored.
          start: the digest of the model that the iteration starts from.
          keep: how many of the newest steps to keep.
          logged: returns the digest of the metrics logged up to a step; called in process 0.
        """
        self.folder = Path(folder)
        self.start = start
        self.keep = keep
        self.logged = logged
        self._mirror = mirrors.of(self.folder)
        self._writer: ocp.StandardCheckpointer | None = None

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, according to the first process."""
        return multihost.on_first(self._steps)

    def save(self, state: TrainState) -> None:
        """Starts saving the state under its step. `state` may be donated as soon as this returns.

        Waits for the previous save first; see `wait`. Does nothing if the step is saved already.
        """
        if (step := int(state.step)) not in self.steps():
            self._begin(str(step), state, step)

    def wait(self) -> None:
        """Waits until the current save is finished, if there is one.

        Raises:
          ArtifactError: if the save failed; the previous checkpoint is undamaged.
        """
        if self._writer is not None:
            writer, self._writer = self._writer, None
            try:
                writer.close()
            except Exception as e:  # libraries raise various exceptions when a disk is full
                raise artifacts.ArtifactError(
                    f"{self.folder}: a checkpoint could not be written ({e}). The previous one is "
                    "undamaged; run the same command to continue from it"
                ) from e
            multihost.on_first(self._tidy)
            self._refresh()

    def latest(self, like: TrainState) -> TrainState | None:
        """Loads the newest state with the shardings of `like`; None if there is none.

        `like` contains arrays or abstract arrays. Its mesh and its number of processes may differ
        from those of the state that was saved.
        """
        steps = self.steps()
        return self._read(str(steps[-1]), like) if steps else None

    def save_final(self, params: Params, step: int = 0) -> None:
        """Saves the parameters for the export, waits until they are saved, and deletes all steps.

        `step`: how many updates were made.
        """
        self._begin(_FINAL, {"params": params}, step)
        self.wait()

    @property
    def has_final(self) -> bool:
        return multihost.on_first(lambda: _FINAL in self._names())

    def final(self, like: Params) -> Params:
        return self._read(_FINAL, {"params": like})["params"]

    def delete(self) -> None:
        multihost.on_first(lambda: artifacts.remove(self.folder))

    def _names(self) -> set[str]:
        """The names of the complete checkpoints."""
        if self._mirror is None:
            return {p.name for p in self.folder.glob("*") if _UNNAMED not in p.name}
        files = map(Path, self._mirror.store.list(self._mirror.key(self.folder)))
        return {file.parent.name for file in files if file.name == _WHOLE}

    def _steps(self) -> list[int]:
        return sorted(int(name) for name in self._names() if name.isdigit())

    def _refresh(self) -> None:
        """Makes the folder of each process equal to the bucket, if there is one."""
        if self._mirror is not None:
            self._mirror.refresh(self.folder)

    # Writing

    def _begin(self, name: str, tree: Any, step: int) -> None:
        self.wait()
        about = multihost.on_first(lambda: self._prepare(step))
        self._refresh()
        self._writer = ocp.StandardCheckpointer(
            async_options=ocp.options.AsyncOptions(
                barrier_sync_fn=self._when_written(name),
                post_finalization_callback=lambda: self._seal(name, about),
                timeout_secs=_LONGEST_SAVE,
            ),
            **({} if self._mirror is None else _IN_OWN_FOLDER),
        )
        self._writer.save(_for_orbax(self.folder) / name, tree)

    def _prepare(self, step: int) -> dict[str, Any]:
        self._clear()
        return {"start": self.start, "step": step, "logged": self.logged(step)}

    def _when_written(self, name: str) -> Callable[..., None]:
        """The function that orbax calls in each process when that process has written its files.

        It hashes these files, then waits for the other processes.
        """
        barrier, told = ocp.multihost.get_barrier_sync_fn(), False

        def wait(*, key: str, timeout_ms: int) -> None:
            nonlocal told
            if not told:
                folder, below = self._unnamed(name), f"ocdbt.process_{multihost.index()}/"
                own = _files(folder, below if self._mirror is None else "")
                known = _hashed(folder, [file for file in own if file not in _LATER])
                self._put(name, folder, known)
                multihost.leave(self._told(name), known)
                told = True  # orbax calls this again after the first process has sealed
            barrier(key=key, timeout_ms=timeout_ms)

        return wait

    def _told(self, name: str) -> str:
        """A name for what the processes tell about a checkpoint, the same in all of them."""
        return f"{self.folder.parent.name}/{self.folder.name}/{name}"

    def _unnamed(self, name: str) -> Path:
        (folder,) = self.folder.glob(f"{name}{_UNNAMED}*")
        return folder

    def _clear(self) -> None:
        """Removes unfinished checkpoints of a process that died."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._mirror is not None:
            at = Path(self._mirror.key(self.folder))
            keys = (Path(key).relative_to(at) for key in self._mirror.store.list(str(at)))
            for name in {key.parts[0] for key in keys} - self._names():
                artifacts.remove(self.folder / name)
        for left in self.folder.glob(f"*{_UNNAMED}*"):
            artifacts.remove(left)

    def _seal(self, name: str, about: dict[str, Any]) -> None:
        """Writes `whole.json`: the size and SHA-256 of each file of a checkpoint.

        Called in the first process after all have written their shards, before orbax renames the
        folder.
        """
        if not multihost.is_first():  # each process seals what it has in a folder of its own
            return
        folder = self._unnamed(name)
        known: dict[str, Any] = {}
        for of_process in reversed(multihost.left(self._told(name))):
            known |= of_process  # of files that several have, that of the first process counts
        rest = _hashed(folder, [file for file in _files(folder) if file not in known])
        self._put(name, folder, rest)
        known |= rest
        files = {file: known[file] for file in sorted(known) if file not in _LATER}
        whole = folder / _WHOLE
        whole.write_text(json.dumps(seal(about | {"files": files})), encoding="utf-8")
        artifacts.flush(folder)
        self._put(name, folder, {_WHOLE: (whole.stat().st_size, sha256(whole))})

    def _put(self, name: str, folder: Path, files: Mapping[str, tuple[int, str]]) -> None:
        """Puts files of a checkpoint into the bucket, if the run is in one."""
        if self._mirror is not None:
            at = self._mirror.key(self.folder / name)
            paths = {f"{at}/{file}": folder / file for file in files}
            self._mirror.put_files(paths, {f"{at}/{file}": sha for file, (_, sha) in files.items()})

    def _tidy(self) -> None:
        """Deletes old steps; at least one complete checkpoint always remains."""
        if self.folder.exists():
            artifacts.flush_folder(self.folder)
        old = self._steps()
        for step in old if _FINAL in self._names() else old[: -self.keep]:
            artifacts.remove(self.folder / str(step) / _WHOLE)  # half deleted, it is not complete
            artifacts.remove(self.folder / str(step))

    # Reading

    def _read(self, name: str, like: Any) -> Any:
        path = (self.folder / name).absolute()
        self._refresh()
        files = multihost.on_first(lambda: self._check(path))
        artifacts.wait_for([path])
        if self._mirror is None:
            # The processes check equal shares; the largest files first, so that none has more.
            mine = sorted(files, key=lambda file: -files[file][0])
            _check_files(path, files, lambda: mine[multihost.index() :: multihost.count()])
        else:  # each checks what it fetches; the small files say which chunks it needs
            _check_files(path, files, lambda: small(files))
            _check_files(path, files, lambda: chunks(path, files, like))
        try:
            with ocp.StandardCheckpointer() as reader:
                there = _for_orbax(self.folder) / name
                return reader.restore(there, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        except (ValueError, KeyError, OSError) as e:
            raise _unreadable(path, str(e)) from e

    def _check(self, path: Path) -> dict[str, tuple[int, str]]:
        """Checks a checkpoint's `whole.json`; returns each file's size and SHA-256.

        Raises:
          ArtifactError: if `whole.json` cannot be read, or the checkpoint belongs to another start
            model or to other logged metrics.
        """
        try:
            about = artifacts.read_sealed(mirrors.need(path / _WHOLE))
        except FileNotFoundError as e:
            raise _unreadable(path, f"{_WHOLE} is missing") from e
        except artifacts.ArtifactError as e:
            raise _unreadable(path, f"{_WHOLE} was changed or damaged") from e
        if about["start"] != self.start:
            raise artifacts.ArtifactError(
                f"{path}: this training started from a model with digest {about['start']}, but the "
                f"model there now has digest {self.start}. Restore the old model, or delete "
                f"{self.folder} to train this iteration again"
            )
        if about["logged"] != self.logged(about["step"]):
            raise artifacts.ArtifactError(
                f"{path}: the lines of metrics.jsonl about this training's first {about['step']} "
                "updates have changed since this checkpoint was written. Restore them, or delete "
                f"{self.folder} to train this iteration again"
            )
        return about["files"]


def _files(folder: Path, below: str = "") -> list[str]:
    """The relative paths of all files below a folder that begin with `below`."""
    files = (file for file in folder.rglob("*") if file.is_file())
    names = (file.relative_to(folder).as_posix() for file in files)
    return [name for name in names if name.startswith(below)]


def _hashed(folder: Path, names: list[str]) -> dict[str, tuple[int, str]]:
    files = [folder / name for name in names]
    sizes = [file.stat().st_size for file in files]
    return dict(zip(names, zip(sizes, sha256_of(files), strict=True), strict=True))


def _check_files(
    path: Path, files: Mapping[str, tuple[int, str]], mine: Callable[[], Iterable[str]]
) -> None:
    """Checks the files `mine` of this process, in all processes; from a bucket, fetches them first.

    Raises:
      ArtifactError: in all processes, if one of them has a file that is missing or has changed.
    """
    faults = multihost.on_every(lambda: _faults(path, files, sorted(mine())))
    if any(faults):
        raise _unreadable(path, "; ".join(dict.fromkeys(itertools.chain(*faults))))


def _faults(folder: Path, files: Mapping[str, tuple[int, str]], names: list[str]) -> list[str]:
    """One message for each file that is missing or has changed since it was written."""
    faults, there = [], []
    try:
        mirrors.need(folder, {*names, *_LATER})
        for name in names:
            file, (size, _) = folder / name, files.get(name, (0, ""))
            if name not in files or not file.exists():
                faults.append(f"its file {name} is missing")
            elif (found := file.stat().st_size) != size:
                faults.append(f"its file {name} has {found} bytes, but {size} were written")
            else:
                there.append(name)
        found_now = _hashed(folder, there)
    except (OSError, StorageError) as e:  # the disk or the bucket cannot be read
        return [*faults, str(e)]
    changed = [name for name in there if found_now[name][1] != files[name][1]]
    return faults + [f"its file {name} was changed or damaged" for name in changed]


def _for_orbax(folder: Path) -> Path:
    """A path of the folder that has no characters which orbax and its libraries misread.

    They take a path with `[`, `*` or `?` for a pattern and a backslash for a slash, and then do not
    find what they have saved. Such a folder gets a link in the cache, whose path is returned.
    """
    folder = folder.absolute()
    if _SPECIAL.isdisjoint(str(folder)):
        return folder
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()
    at = cache_root().absolute() / "checkpoints" / name
    if not _SPECIAL.isdisjoint(str(at)):
        raise artifacts.ArtifactError(
            f"{folder}: checkpoints cannot be written to a path with one of the characters "
            f"{' '.join(sorted(_SPECIAL))}, and the cache {at} has one too. Give the run another "
            "`output`, or set SELM_CACHE to another folder"
        )
    artifacts.link(at, folder)
    return at


def _unreadable(path: Path, why: str) -> artifacts.ArtifactError:
    return artifacts.ArtifactError(
        f"{path}: this checkpoint cannot be read ({why}). Delete the folder; the iteration's "
        "training then starts again from its last complete checkpoint, or from its beginning"
    )
