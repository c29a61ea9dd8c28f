"""Compares a policy's scores in the tasks of the capability guard with the start model's.

Both models answer the same questions, so the change of a score is a paired difference, question by
question, and its interval is much shorter than the intervals of the two scores. A measure that is
no mean of questions, such as a perplexity, is one number: it has no interval and is not compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.frontier import as_metrics
from selm_jax.statistics.intervals import difference, pooled
from selm_jax.statistics.proportions import counted
from selm_jax.tables.task_scores import Row

Metrics = Mapping[str, float | None]


def summarize(rows: Sequence[Row], start: Sequence[Row] | None) -> dict[str, float | None]:
    """The metrics of one iteration, from the tables of its policy and of the start model.

    Args:
      start: None if `rows` are the start model's.

    Returns:
      For each measure `tasks/TASK/MEASURE`, its standard error `..._stderr` and the ends of its
      95 % interval `..._low` and `..._high`; from iteration 1 on `..._change`, the mean difference
      to the start model, with its ends; and `tasks/fallen`, the number of measures that `fallen`
      lists.

    Raises:
      EvaluationError: the start model was asked something else.
    """
    before = {} if start is None else dict(_by_measure(start))
    out: dict[str, float | None] = {}
    for key, mine in _by_measure(rows):
        name, values = _name(key), _values(mine)
        if mine[0].question is None:
            out[name] = float(values[0, 0])
            continue
        found = pooled(values, share=counted(values.ravel()))
        out |= as_metrics(name, found)
        if found is not None and found.stderr is not None:
            out[f"{name}_stderr"] = found.stderr
        if start is None:
            continue
        others = before.get(key, [])
        if _asked(others) != _asked(mine):
            raise EvaluationError(
                f"task {key[0]}: the start model was asked other questions, with another "
                "prompt, or other answers were right. lm-eval, its data, the task's file or the "
                "chat template have changed since. Go back to them, or measure the start model "
                "again: `selm redo RUN evaluate -t 0`"
            )
        others = _values(others)
        share = counted(np.append(values, others))
        out |= as_metrics(f"{name}_change", difference(values, others, share=share))
    if start is not None:
        out["tasks/fallen"] = len(fallen(rows, out))
    return out


def fallen(rows: Sequence[Row], metrics: Metrics) -> list[str]:
    """Names the measures that are worse than the start model's by more than their interval."""
    found = []
    for key, mine in _by_measure(rows):
        low, high = (metrics.get(f"{_name(key)}_change_{end}") for end in ("low", "high"))
        better = mine[0].higher_is_better
        if low is not None and high is not None and better is not None:
            found += [_name(key)] if (high < 0 if better else low > 0) else []
    return found


def lines(rows: Sequence[Row], metrics: Metrics) -> Iterator[str]:
    """Yields the scores in words, one line for each measure, and then a warning if some fell."""
    for key, _ in _by_measure(rows):
        name = _name(key)
        text = f"{key[0]}, {key[1]}: {_number(metrics[name])}"
        if (stderr := metrics.get(f"{name}_stderr")) is not None:
            text += f", standard error {_number(stderr)}"
        if (change := metrics.get(f"{name}_change")) is not None:
            text += f", change {_number(change)}"
            low, high = (metrics.get(f"{name}_change_{end}") for end in ("low", "high"))
            text += "" if low is None else f" [{_number(low)}, {_number(high)}]"
        yield text
    if worse := fallen(rows, metrics):
        yield (
            f"capability guard: {', '.join(worse)} fell against the start model by more than the "
            "95 % interval of the change. If the reward rises, do not trust it alone"
        )


def _by_measure(rows: Sequence[Row]) -> Iterator[tuple[tuple[str, str], list[Row]]]:
    """Yields the rows of each task and measure, which stand together."""
    for key, mine in groupby(rows, lambda row: (row.task, row.measure)):
        yield key, list(mine)


def _name(key: tuple[str, str]) -> str:
    return f"tasks/{key[0]}/{key[1]}"


def _values(rows: Sequence[Row]) -> np.ndarray:
    return np.array([[row.value for row in rows]], np.float64)


def _asked(rows: Sequence[Row]) -> list[tuple[int | None, str]]:
    return [(row.question, row.prompt) for row in rows]


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
