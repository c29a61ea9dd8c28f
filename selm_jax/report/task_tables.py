"""Makes the tables and plots of the tasks that a run's capability guard measures."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from selm_jax.report.curves import Plot
from selm_jax.report.data import RunData
from selm_jax.report.files import Table
from selm_jax.report.run_plots import Point, by_iteration

_ENDS = ("", "_low", "_high")
_SCORE = re.compile(r"tasks/(.+)/(.+?)(?<!_stderr)(?<!_low)(?<!_high)(?<!_change)")


def task_rows(run: RunData) -> list[dict[str, Any]]:
    """The score of each measure in each iteration, with its standard error and its change."""
    return [
        {
            "task": task,
            "measure": measure,
            "iteration": k,
            "score": _triple(run, k, f"tasks/{task}/{measure}"),
            "stderr": run.evaluations[k].get(f"tasks/{task}/{measure}_stderr"),
            "change": _triple(run, k, f"tasks/{task}/{measure}_change"),
        }
        for task, measure in _measures([run])
        for k in run.evaluations
        if f"tasks/{task}/{measure}" in run.evaluations[k]
    ]


def task_table(label: str, rows: Sequence[dict[str, Any]]) -> Table:
    names = [f"{name}{end}" for name in ("score", "change") for end in _ENDS]
    data = [
        [r["task"], r["measure"], r["iteration"], *r["score"], *r["change"], r["stderr"]]
        for r in rows
    ]
    return Table(f"{label}_tasks", ["task", "measure", "iteration", *names, "stderr"], data)


def task_plots(runs: Sequence[RunData], labels: Sequence[str]) -> list[Plot]:
    return [
        by_iteration(
            runs, labels, f"task-{task}-{measure}",
            lambda run, name=f"tasks/{task}/{measure}": _points(run, name),
            title=f"{task}: {measure}",
            how="Bars are 95 % intervals over the questions. All iterations answer the same ones, "
            "so the interval of the change in the table is shorter.",
        )
        for task, measure in _measures(runs)
    ]  # fmt: skip


def fallen(run: RunData) -> list[str]:
    """Warns of each iteration with scores that are worse than the start model's."""
    return [
        f"Iteration {k}: {count:.0f} of the capability guard's scores are worse than the start "
        "model's by more than the 95 % interval of the change."
        for k, found in run.evaluations.items()
        if (count := found.get("tasks/fallen"))
    ]


def _measures(runs: Sequence[RunData]) -> list[tuple[str, str]]:
    keys = dict.fromkeys(key for run in runs for found in run.evaluations.values() for key in found)
    return [(found[1], found[2]) for key in keys if (found := _SCORE.fullmatch(key))]


def _triple(run: RunData, k: int, name: str) -> tuple[float | None, float | None, float | None]:
    value, low, high = (run.evaluations[k].get(f"{name}{end}") for end in _ENDS)
    return value, low, high


def _points(run: RunData, name: str) -> list[Point]:
    found = [(k, *_triple(run, k, name)) for k in run.evaluations]
    return [
        (k, value, math.nan if low is None else low, math.nan if high is None else high)
        for k, value, low, high in found
        if value is not None and math.isfinite(value)
    ]
