"""What an experiment trains, as its loss says: a language model or a reward model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from selm_jax.objectives.build import build_objective
from selm_jax.objectives.losses import Objective
from selm_jax.run.rows import RunError
from selm_jax.shell import artifacts
from selm_jax.shell.user_code import is_user_code


class Task:
    """The objective of an experiment, and what follows from it.

    Args:
      settings: the experiment's `objective`: the loss and its arguments.
      looked_at: the folder of a run that is only looked at. Code of the user's is then never
        imported: what follows from it is read from the run's manifest.
    """

    def __init__(self, settings: Mapping[str, Any], looked_at: Path | None = None):
        self.settings, self.looked_at = settings, looked_at

    @cached_property
    def objective(self) -> Objective:
        settings = dict(self.settings)
        loss = settings.pop("loss")
        if self.looked_at is not None:
            refuse_user_code(self.looked_at, "objective.loss", loss)
        return build_objective(loss, **settings)

    @cached_property
    def rates(self) -> bool:
        """Whether a reward model is trained."""
        return self._says("rates")

    @cached_property
    def reference_free(self) -> bool:
        """Whether the reference need not be scored."""
        return self._says("reference_free")

    def _says(self, what: str) -> bool:
        if self.looked_at is None or not is_user_code(self.settings["loss"]):
            return getattr(self.objective, what)
        file = self.looked_at / "manifest.json"
        return file.exists() and bool(artifacts.read_sealed(file).get(what))


def refuse_user_code(folder: Path, key: str, name: str) -> None:
    """Raises RunError if a setting of a run that is only looked at names code of the user's."""
    if is_user_code(name):
        raise RunError(
            f"{folder / 'config.yaml'}: {key} is {name!r}, code that this verb does not run: "
            "it only looks at the folder"
        )
