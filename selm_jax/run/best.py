"""Finds the best iteration of a run by one held-out metric (`keep_best`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selm_jax.config import Experiment
from selm_jax.config.heldout import OF_ANSWERS, OF_PAIRS
from selm_jax.run.folder import Folder
from selm_jax.shell import artifacts


@dataclass(frozen=True)
class Best:
    """The iteration with the best value of a metric; iteration 0 is the start model."""

    metric: str
    iteration: int
    value: float

    def entry(self, folder: Folder) -> dict[str, Any]:
        """Returns its entry in manifest.json; the model's folder is relative to the run's.

        If `keep_models: last` deleted this model before `keep_best` named its metric, it says so.
        """
        if not self.iteration:
            return {**vars(self), "model": "the start model"}
        gone = "model" in artifacts.Stages(folder.iteration(self.iteration)).gone()
        model = f"iteration_{self.iteration}/model{' (deleted)' if gone else ''}"
        return {**vars(self), "model": model}


def best_of(metric: str, evaluations: Mapping[int, Mapping[str, Any]]) -> Best | None:
    """The best of the evaluated models; of equal ones the first, which was trained least.

    An evaluation without a finite value does not count. A model that is not the best of the first
    t iterations is not the best of more iterations either, so it may be deleted.

    Args:
      evaluations: the metrics of each evaluated iteration.

    Returns:
      The best one; None if no evaluation has the metric.
    """
    measure = metric.rpartition("/")[2]
    sign = 1 if (OF_ANSWERS | OF_PAIRS).get(measure, True) else -1
    found = [(t, line.get(metric)) for t, line in sorted(evaluations.items())]
    known = [(t, value) for t, value in found if value is not None and math.isfinite(value)]
    if not known:
        return None
    t, value = max(known, key=lambda each: sign * each[1])  # max returns the first of equal ones
    return Best(metric, t, value)


def best_so_far(e: Experiment, folder: Folder, t: int) -> Best | None:
    """The best model up to iteration t by `keep_best`; None if none is named or measured."""
    if e.keep_best is None:
        return None
    lines = {u: folder.logged("evaluate", u) for u in range(t + 1)}
    return best_of(e.keep_best, {u: found[-1] for u, found in lines.items() if found})
