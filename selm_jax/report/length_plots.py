"""Plots the lengths of answers by iteration, and the slope of the reward over length."""

from __future__ import annotations

import math
from collections.abc import Sequence

from selm_jax.report.curves import Plot
from selm_jax.report.data import RunData
from selm_jax.report.run_plots import Point, by_iteration
from selm_jax.statistics.lengths import UNIT

# (stage whose counts have the number, None for held-out metrics; key; answers)
_LENGTHS = (
    ("rank", "length/chosen", "chosen answers"),
    ("rank", "length/rejected", "rejected answers"),
    ("rank", "length/policy", "the policy's candidates"),
    (None, "length", "held-out greedy answers"),
    (None, "length_sample", "held-out sampled answers"),
)
_SLOPES = (
    ("rank", "length/slope", "candidates"),
    (None, "length_slope", "held-out answers"),
)


def length_plots(runs: Sequence[RunData], labels: Sequence[str]) -> list[Plot]:
    """Plots what the runs have recorded; runs of earlier versions recorded only one mean."""
    plots = []
    for stage, key, answers in _LENGTHS:
        plots.append(
            by_iteration(
                runs, labels, f"length-{stage}-{key}",
                lambda run, at=(stage, key): _points(run, *at, _quantiles),
                title=f"Length of {answers}, tokens",
                how="Mean length; bars go from the 10 % to the 90 % quantile of the answers.",
                include=(0, 0),
            )
        )  # fmt: skip
    for stage, key, answers in _SLOPES:
        plots.append(
            by_iteration(
                runs, labels, f"slope-{stage}-{key}",
                lambda run, at=(stage, key): _points(run, *at, _errors),
                title=f"Reward by length, {answers}",
                how=f"Change of the score for {UNIT} tokens more, among the answers to the same "
                "prompt; bars are two standard errors. If it is above 0 and the lengths grow, "
                "part of the reward may be length alone.",
                zero=True,
            )
        )  # fmt: skip
    return [plot for plot in plots if plot.drawing]


def _points(run: RunData, stage: str | None, key: str, bars) -> list[Point]:
    found = []
    for k in run.iterations:
        if stage is None:
            metrics = {name: run.metric(k, name) for name in _names(key)}
        else:
            record = run.stages.get(k, {}).get(stage)
            metrics = {name: record and record.counts.get(name) for name in _names(key)}
        if (value := metrics[key]) is not None:
            low, high = bars(value, metrics, key)
            found.append((k, value, low, high))
    return found


def _names(key: str) -> tuple[str, ...]:
    return (key, *(f"{key}{end}" for end in ("_p10", "_p90", "_stderr")))


def _quantiles(_mean: float, metrics, key: str) -> tuple[float, float]:
    return _known(metrics[f"{key}_p10"]), _known(metrics[f"{key}_p90"])


def _errors(slope: float, metrics, key: str) -> tuple[float, float]:
    error = _known(metrics[f"{key}_stderr"])
    return slope - 2 * error, slope + 2 * error


def _known(value: float | None) -> float:
    return math.nan if value is None else value
