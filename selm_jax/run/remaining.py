"""Estimates a run's remaining time from the durations of its finished stages."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selm_jax.shell import artifacts

Entries = Mapping[int, Mapping[str, Any]]  # of each iteration's stage.json


def entries_of(run: Path) -> dict[int, dict[str, Any]]:
    """The content of each iteration's stage.json; empty if the run folder does not exist.

    Raises:
      ArtifactError: an entry was changed or is damaged.
    """
    if not run.exists():
        return {}
    return {t: artifacts.Stages(folder).read() for t, folder in artifacts.iterations(run).items()}


def time_left(entries: Entries, iterations: int, stage: str = "", t: int = 0) -> float | None:
    """Estimates the seconds that the unfinished stages will take.

    A stage is expected to take its average time over the finished iterations.

    Args:
      entries: the content of the run's stage.json files, from `entries_of`.
      stage, t: the stage that is running now, if any; it is not counted.

    Returns:
      None until the first iteration is done, because some stages have not been timed before that.
    """
    seconds = defaultdict(list)
    for each in entries.values():
        for name, entry in each.items():
            if entry["done"]:
                seconds[name].append(entry["seconds"])
    first = {name for name, entry in entries.get(1, {}).items() if entry["done"]}
    names = first | ({"evaluate"} if "evaluate" in entries.get(0, {}) else set())
    if "export" not in first or not names <= set(seconds):
        return None
    left = 0.0
    for u in range(1, iterations + 1):
        for name in names:
            if (u, name) != (t, stage) and not entries.get(u, {}).get(name, {}).get("done"):
                left += statistics.fmean(seconds[name])
    return left
