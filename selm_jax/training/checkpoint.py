"""The state of training on disk, through orbax: sharded, whole, and enough to go on exactly.

The order of the data is a function of the step, so there is nothing else to save. When the last
update is done only the parameters are kept, for the export.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from selm_jax import artifacts
from selm_jax.models.decoder import Params
from selm_jax.training.state import TrainState

_FINAL = "final"


class Checkpoints:
    """The checkpoints of one iteration, each in a folder named by its step, or `final`."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def steps(self) -> list[int]:
        names = [p.name for p in self.folder.glob("*")] if self.folder.exists() else []
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, state: TrainState) -> None:
        """Saves the state under its step, then deletes older ones: one is always whole."""
        step = int(state.step)
        self._write(str(step), state)
        for old in self.steps():
            if old != step:
                artifacts.remove(self.folder / str(old))

    def latest(self, like: TrainState) -> TrainState | None:
        """The newest state, laid out like `like` (arrays or abstract arrays with shardings)."""
        steps = self.steps()
        return self._read(str(steps[-1]), like) if steps else None

    def save_final(self, params: Params) -> None:
        self._write(_FINAL, {"params": params})
        for old in self.steps():
            artifacts.remove(self.folder / str(old))

    @property
    def has_final(self) -> bool:
        return (self.folder / _FINAL).exists()

    def final(self, like: Params) -> Params:
        return self._read(_FINAL, {"params": like})["params"]

    def delete(self) -> None:
        artifacts.remove(self.folder)

    def _write(self, name: str, tree: Any) -> None:
        with artifacts.whole(self.folder / name) as partial, ocp.StandardCheckpointer() as writer:
            writer.save(partial.absolute(), tree)
            writer.wait_until_finished()

    def _read(self, name: str, like: Any) -> Any:
        path = (self.folder / name).absolute()
        try:
            with ocp.StandardCheckpointer() as reader:
                return reader.restore(path, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        except (ValueError, KeyError, OSError) as e:
            raise artifacts.ArtifactError(
                f"{path}: this checkpoint cannot be read ({e}). Delete the folder: the iteration's "
                "training starts again from its last whole checkpoint, or from its beginning"
            ) from e
