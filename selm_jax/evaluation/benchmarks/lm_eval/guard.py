"""Measures a run's lm-eval tasks after each iteration, with the run's own decoder.

No code of a data set runs: `datasets` has no loading scripts since its version 4, and lm-eval
refuses tasks that execute what the model writes. The task files themselves may name Python code:
those of lm-eval are installed with it, and those of `evaluation.task_folder` are the user's own.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from selm_jax.config import Evaluation
from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.lm_eval import adapter
from selm_jax.evaluation.benchmarks.lm_eval import tasks as lm_eval_tasks
from selm_jax.policy.policy import Policy
from selm_jax.shell.shared_stages import key_of
from selm_jax.statistics.intervals import parts
from selm_jax.tables.task_scores import Row


@dataclass(frozen=True)
class Tasks:
    """The loaded tasks of an experiment, with their data.

    Attributes:
      tasks, manager: lm-eval's own objects. A group among the tasks has an aggregate, which is the
        group's one score in each measure.
    """

    settings: Evaluation
    seed: int
    tasks: list[Any]
    manager: Any

    def measure(self, policy: Policy, bar: adapter.Bar = adapter.no_bar) -> list[Row]:
        """Returns a model's score of every question in every measure of every task.

        A group has its aggregate, and then the questions of its members. All is the same each time,
        because the seeds of shots and of samples are set each time.

        Raises:
          EvaluationError: a task does not fit the model, or lm-eval finds nothing to aggregate in a
            group; the message says which and why.
        """
        results = adapter.evaluated(
            adapter.Harness(policy.fitting(), self.seed, bar), self.tasks, self.manager,
            chat=self.settings.task_chat, limit=self.settings.task_limit, bootstrap_iters=0,
            log_samples=True,
        )  # fmt: skip
        return [
            row
            for each in self.tasks
            for row in (_of_group if _is_group(each) else _of_task)(each, results)
        ]


def load(settings: Evaluation, seed: int) -> Tasks:
    """Loads the tasks that `evaluation.tasks` names, and their data.

    A tag of lm-eval, or a group without an aggregate, is short for its members.

    Raises:
      EvaluationError: a task is unknown, is named twice, runs the model's code or reads images or
        sounds; its data cannot be loaded; or lm-eval would give no results in this process.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        raise EvaluationError(
            "lm-eval gives results only where LOCAL_RANK is 0. Unset LOCAL_RANK, which "
            "selm_jax does not use, and start the run again"
        )
    folder, adds = settings.task_folder, "evaluation.task_folder"
    manager = lm_eval_tasks.manager(None if folder is None else Path(folder).absolute(), adds)
    shots = lm_eval_tasks.tasks_of(settings.tasks, manager, "evaluation.tasks", adds)
    loaded = lm_eval_tasks.load_tasks(shots, manager)
    return Tasks(settings, seed, [one for each in loaded for one in _scored(each)], manager)


def _is_group(task: Any) -> bool:
    from lm_eval.api.group import Group  # it is installed if the module `adapter` is imported

    return isinstance(task, Group)


def _scored(task: Any) -> Iterator[Any]:
    """Yields a task, or a group with an aggregate; of other groups, it yields their members."""
    if not _is_group(task) or task.has_aggregation:
        yield task
    else:
        for member in task:
            yield from _scored(member)


def _of_task(task: Any, results: Mapping[str, Any]) -> Iterator[Row]:
    """Yields the scores of one task, by measure and then by question."""
    for key in _keys(results["results"][task.config.task]):
        yield from _of_measure(task, key, results)


def _of_group(group: Any, results: Mapping[str, Any]) -> Iterator[Row]:
    """Yields the scores of one group, by measure: its aggregate, and then its members' questions.

    lm-eval makes a group's standard error from those of its members. These are computed here,
    because lm-eval bootstraps some of them and has none of others.
    """
    from lm_eval.api.metrics import mean_stderr

    members = {task.config.task: task for task in group.get_all_tasks()}
    found = {name: dict(results["results"][name]) for name in members}
    keys = dict.fromkeys(key for each in found.values() for key in _keys(each))
    rows = {
        (name, key): list(_of_measure(task, key, results))
        for name, task in members.items()
        for key in keys
        if key in found[name]
    }
    for (name, key), each in rows.items():
        if len(each) > 1:
            found[name][_stderr(key)] = mean_stderr([row.value for row in each])
    total, shares = group.aggregate(found), _shares(group, found, keys)
    if not any(key in total for key in keys):
        raise EvaluationError(
            f"evaluation.tasks: lm-eval found nothing to aggregate in the group {group.name}. Its "
            f"members measure {', '.join(keys)}. Correct the group's aggregate_metric_list, or "
            f"name its members instead: {', '.join(members)}"
        )
    for key in keys:
        mine = [(name, row) for name in members for row in rows.get((name, key), ())]
        if key in total:
            stderr, better = total[_stderr(key)], {row.higher_is_better for _, row in mine}
            yield Row(
                group.name, _label(key), None, "", float(total[key]),
                better.pop() if len(better) == 1 else None, group.name,
                stderr=None if stderr == "N/A" else float(stderr),
            )  # fmt: skip
        for name, row in mine:
            yield replace(row, group=group.name, share=shares.get((name, key)))


def _shares(
    group: Any, found: Mapping[str, Any], keys: Collection[str]
) -> dict[tuple[str, str], float]:
    """The weight of each member in a group's aggregate of a measure, by member and measure.

    lm-eval's aggregates are linear, so a member's weight is the aggregate of its unit vector.
    """
    units = np.eye(len(found))
    alone = {
        name: {"sample_len": each["sample_len"], **{key: units[n] for key in keys if key in each}}
        for n, (name, each) in enumerate(found.items())
    }
    total = group.aggregate(alone)
    return {
        (name, key): float(total[key][n])
        for n, name in enumerate(found)
        for key in keys
        if key in total
    }


def _of_measure(task: Any, key: str, results: Mapping[str, Any]) -> Iterator[Row]:
    """Yields the scores of one task in one measure, by question if it can be told by question."""
    name, (measure, _, kind) = task.config.task, key.partition(",")
    higher = results["higher_is_better"].get(name, {}).get(measure)
    samples = [
        sample
        for sample in results["samples"][name]
        if sample["filter"] == kind and measure in sample["metrics"]
    ]
    values = _by_question(task.aggregation().get(measure), [each[measure] for each in samples])
    if values is None:
        yield Row(name, _label(key), None, "", float(results["results"][name][key]), higher)
        return
    for sample, value in zip(samples, values, strict=True):
        # The doc has more than the prompt, and the target may come from the task's code.
        asked = key_of(**{k: sample[f"{k}_hash"] for k in ("doc", "prompt", "target")})
        yield Row(name, _label(key), sample["doc_id"], asked, float(value), higher)


def _by_question(aggregate: Any, items: list[Any]) -> Float[np.ndarray, " questions"] | None:
    """Each question's part in a measure, so that the mean of the parts is the measure.

    A perplexity is the exponential of a ratio of sums over documents: their loss, and their words
    or bytes. Its parts are on the tangent of the exponential at this ratio, so that their standard
    error is that of the delta method (Casella and Berger, Statistical Inference, 2002, section
    5.5.4). lm-eval bootstraps the perplexity of answers, and has no error of the others.

    Returns:
      None for other measures that are no mean.

    Args:
      aggregate: lm-eval's function that makes the measure from `items`.
      items: what lm-eval keeps of each question.
    """
    from lm_eval.api import metrics

    if aggregate is metrics.mean:
        return np.asarray(items, np.float64)
    if aggregate is metrics.perplexity:
        items = [(item, 1) for item in items]
    elif aggregate not in (metrics.weighted_perplexity, metrics.bits_per_byte):
        return None
    logps, sizes = np.asarray(items, np.float64).T
    losses = parts(-logps, sizes)  # in nats per word or byte
    if aggregate is metrics.bits_per_byte:
        return losses / np.log(2)
    return np.exp(losses.mean()) * (1 + losses - losses.mean())


def _keys(found: Mapping[str, Any]) -> Iterator[str]:
    """Yields the keys of measures, such as "exact_match,strict-match", among lm-eval's results."""
    for key, value in found.items():
        measure, _, kind = key.partition(",")
        if kind and not measure.endswith("_stderr") and isinstance(value, int | float):
            yield key


def _label(key: str) -> str:
    return key.removesuffix(",none")


def _stderr(key: str) -> str:
    return "_stderr,".join(key.split(",", 1))
