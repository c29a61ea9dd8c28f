"""Compares a policy's scores in the tasks of the capability guard with the start model's.

Both models answer the same questions, so the change of a score is a paired difference, question by
question, and its interval is much shorter than the intervals of the two scores. A measure without
parts by question, such as BLEU, is one number: it has no interval and is not compared. A group of
tasks has one number too, the aggregate of lm-eval. Its interval and that of its change are those of
stratified sampling: they apply to other questions of the same tasks. There is none if a task has
one question only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np
from jaxtyping import Float

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.frontier import as_metrics
from selm_jax.statistics.intervals import Estimate, difference, pooled, stratified
from selm_jax.statistics.proportions import counted
from selm_jax.tables.task_scores import Row

Metrics = Mapping[str, float | None]
Strata = tuple[list[Float[np.ndarray, " questions"]], list[float]]


def summarize(rows: Sequence[Row], start: Sequence[Row] | None) -> dict[str, float | None]:
    """The metrics of one iteration, from the tables of its policy and of the start model.

    Args:
      start: None if `rows` are the start model's.

    Returns:
      For each measure `tasks/TASK/MEASURE` of a task or group, its standard error `..._stderr` and
      the ends of its 95 % interval `..._low` and `..._high`; from iteration 1 on `..._change`, the
      difference to the start model, with its ends; and `tasks/fallen`, the number of measures that
      `fallen` lists.

    Raises:
      EvaluationError: the start model was asked something else.
    """
    before = {} if start is None else dict(_by_measure(start))
    out: dict[str, float | None] = {}
    for key, mine in _by_measure(rows):
        name, strata = _name(key), _strata(mine)
        if strata is None:
            out[name] = mine[0].value
            continue
        found = _score(strata, _is_share(mine))
        out |= as_metrics(name, found)
        if found is not None and found.stderr is not None:
            out[f"{name}_stderr"] = found.stderr
        if mine[0].question is None:  # of a group, lm-eval's own numbers
            out |= {name: mine[0].value, f"{name}_stderr": mine[0].stderr}
        if start is None:
            continue
        first = before.get(key, [])
        if mine[0].group is None and len(first) == 1 and first[0].question is None:
            continue  # an earlier version measured a perplexity as one number
        if _asked(first) != _asked(mine) or (others := _strata(first)) is None:
            raise EvaluationError(
                f"task {key[0]}: the start model was asked other questions, with another "
                "prompt, or other answers were right. lm-eval, its data, the task's file or the "
                "chat template have changed since. Go back to them, or measure the start model "
                "again: `selm redo RUN evaluate -t 0`"
            )
        change = _change(strata, others, _is_share([*mine, *first]))
        out |= as_metrics(f"{name}_change", change)
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
    """Yields the scores in words, one line for each measure, and a warning if some are worse."""
    for key, mine in _by_measure(rows):
        name = _name(key)
        text = f"{key[0]}, {key[1]}: {_number(metrics[name])}"
        if (stderr := metrics.get(f"{name}_stderr")) is not None:
            text += f", standard error {_number(stderr)}"
        if (change := metrics.get(f"{name}_change")) is not None:
            text += f", change {_number(change)}"
            low, high = (metrics.get(f"{name}_change_{end}") for end in ("low", "high"))
            text += "" if low is None else f" [{_number(low)}, {_number(high)}]"
        if single := [each[0].task for each in _members(mine) if len(each) == 1]:
            text += f", no interval, because {single[0]} has one question only"
        yield text
    if worse := fallen(rows, metrics):
        yield (
            f"capability guard: {', '.join(worse)}: worse than the start model by more than the "
            "95 % interval of the change. If the reward rises, do not trust it alone"
        )


def _by_measure(rows: Sequence[Row]) -> Iterator[tuple[tuple[str, str], list[Row]]]:
    """Yields the rows of each measure of a task or group, which stand together.

    A group's measure begins with its aggregate; one that lm-eval does not aggregate is left out.
    """
    for key, mine in groupby(rows, lambda row: (row.group or row.task, row.measure)):
        first, *others = mine
        if first.group is None or first.question is None and first.task == first.group:
            yield key, [first, *others]


def _name(key: tuple[str, str]) -> str:
    return f"tasks/{key[0]}/{key[1]}"


def _strata(rows: Sequence[Row]) -> Strata | None:
    """The values of a measure by task, with the tasks' weights. A task's own measure has one task.

    Returns None if a measure has no values by question, or a member of a group has no weight or
    only one question, which does not show how much others differ.
    """
    if rows[0].question is not None:
        return [_values(rows)], [1.0]
    members = _members(rows)
    shares = [each[0].share for each in members if each[0].share is not None]
    if not members or min(map(len, members)) < 2 or len(shares) < len(members):
        return None
    return [_values(each) for each in members], shares


def _members(rows: Sequence[Row]) -> list[list[Row]]:
    """The questions of each member of a group, whose aggregate comes first; of a task none."""
    if rows[0].question is not None:
        return []
    return [list(each) for _, each in groupby(rows[1:], lambda row: row.task)]


def _score(of: Strata, share: bool) -> Estimate | None:
    values, weights = of
    if len(values) == 1:
        return pooled(values[0][None], share=share)
    return stratified(values, weights, share=share)


def _change(of: Strata, others: Strata, share: bool) -> Estimate | None:
    values, weights = of
    if len(values) == 1:
        return difference(values[0][None], others[0][0][None], share=share)
    return stratified(values, weights, others[0], share=share)


def _values(rows: Sequence[Row]) -> Float[np.ndarray, " questions"]:
    return np.array([row.value for row in rows], np.float64)


def _is_share(rows: Sequence[Row]) -> bool:
    return counted(row.value for row in rows if row.question is not None)


def _asked(rows: Sequence[Row]) -> list[tuple[str, int | None, str]]:
    return [(row.task, row.question, row.prompt) for row in rows]


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
