"""The state of training on disk, through orbax: sharded, whole, and enough to go on exactly.

Every process writes its own shards, in the background, while the next updates are computed. A
checkpoint gets its name, the number of its step, when all of them are through: until then it is a
folder that nobody reads. In it lies `whole.json`: the size of each file, and the digest of the model
that the iteration started from, without which it means nothing.

The order of the data is a function of the step, so there is nothing else to save. When the last
update is done only the parameters are kept, for the export.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from selm_jax import artifacts
from selm_jax.models.decoder import Params
from selm_jax.parallel import multihost
from selm_jax.training.state import TrainState

_FINAL = "final"
_WHOLE = "whole.json"
_UNNAMED = ".orbax-checkpoint-tmp"  # what orbax adds to a name until all is written


class Checkpoints:
    """The checkpoints of one iteration, each in a folder named by its step, or `final`.

    Several processes call the same methods in the same order.
    """

    def __init__(self, folder: Path, *, reference: str = "", keep: int = 1):
        """
        Args:
          reference: the digest of the model that the iteration starts from.
          keep: how many steps stay; the newest.
        """
        self.folder = Path(folder)
        self.reference = reference
        self.keep = keep
        self._writer: ocp.StandardCheckpointer | None = None

    def steps(self) -> list[int]:
        """Those that are whole, as the first process sees them."""
        return multihost.on_first(self._steps)

    def save(self, state: TrainState) -> None:
        """Begins to save the state under its step. `state` may be donated as soon as this returns.

        Waits for the save before it, and raises what went wrong with that.
        """
        self._begin(str(int(state.step)), state)

    def wait(self) -> None:
        """Waits for a save that is under way. Raises what went wrong with it."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
            multihost.on_first(self._tidy)

    def latest(self, like: TrainState) -> TrainState | None:
        """The newest state, laid out like `like` (arrays or abstract arrays with shardings), which
        may be on another mesh, or of another number of processes, than the one that was saved."""
        steps = self.steps()
        return self._read(str(steps[-1]), like) if steps else None

    def save_final(self, params: Params) -> None:
        """Saves what the export needs, waits for it, and deletes all steps."""
        self._begin(_FINAL, {"params": params})
        self.wait()

    @property
    def has_final(self) -> bool:
        return multihost.on_first((self.folder / _FINAL).exists)

    def final(self, like: Params) -> Params:
        return self._read(_FINAL, {"params": like})["params"]

    def delete(self) -> None:
        multihost.on_first(lambda: artifacts.remove(self.folder))

    def _steps(self) -> list[int]:
        names = [p.name for p in self.folder.glob("*")] if self.folder.exists() else []
        return sorted(int(name) for name in names if name.isdigit())

    # Writing

    def _begin(self, name: str, tree: Any) -> None:
        self.wait()
        multihost.on_first(self._clear)
        self._writer = ocp.StandardCheckpointer(
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=lambda: self._seal(name)
            )
        )
        self._writer.save((self.folder / name).absolute(), tree)

    def _clear(self) -> None:
        """Removes what a process that died had begun."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"*{_UNNAMED}*"):
            artifacts.remove(left)

    def _seal(self, name: str) -> None:
        """Called in the first process when all have written their shards, before orbax renames."""
        (folder,) = self.folder.glob(f"{name}{_UNNAMED}*")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        sizes = {
            file.relative_to(folder).as_posix(): file.stat().st_size
            # Orbax writes the time into this one, later.
            for file in files
            if file.name != "_CHECKPOINT_METADATA"
        }
        about = {"reference": self.reference, "files": sizes}
        (folder / _WHOLE).write_text(json.dumps(about, indent=1), encoding="utf-8")
        artifacts.flush(folder)

    def _tidy(self) -> None:
        """Deletes the steps that are not kept any more; one is always whole."""
        if self.folder.exists():
            artifacts.flush_folder(self.folder)
        old = self._steps()
        for step in old if (self.folder / _FINAL).exists() else old[: -self.keep]:
            artifacts.remove(self.folder / str(step))

    # Reading

    def _read(self, name: str, like: Any) -> Any:
        path = (self.folder / name).absolute()
        multihost.on_first(lambda: self._check(path))
        artifacts.wait_for([path])
        try:
            with ocp.StandardCheckpointer() as reader:
                return reader.restore(path, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        except (ValueError, KeyError, OSError) as e:
            raise _unreadable(path, str(e)) from e

    def _check(self, path: Path) -> None:
        """Raises ArtifactError if a file is missing or short, or the reference is another."""
        try:
            about = json.loads((path / _WHOLE).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError) as e:
            raise _unreadable(path, f"{_WHOLE} is missing or torn") from e
        for name, size in about["files"].items():
            file = path / name
            if not file.exists():
                raise _unreadable(path, f"its file {name} is missing")
            if file.stat().st_size != size:
                found = file.stat().st_size
                raise _unreadable(path, f"its file {name} has {found} bytes, {size} were written")
        if about["reference"] != self.reference:
            raise artifacts.ArtifactError(
                f"{path}: this training started from the model with digest {about['reference']}, "
                f"the model there now has {self.reference}. Put that model back, or delete "
                f"{self.folder} to train this iteration again"
            )


def _unreadable(path: Path, why: str) -> artifacts.ArtifactError:
    return artifacts.ArtifactError(
        f"{path}: this checkpoint cannot be read ({why}). Delete the folder: the iteration's "
        "training starts again from its last whole checkpoint, or from its beginning"
    )
