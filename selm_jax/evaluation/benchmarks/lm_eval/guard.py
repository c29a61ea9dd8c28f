"""Measures a run's lm-eval tasks after each iteration, with the run's own decoder.

No code of a data set runs: `datasets` has no loading scripts since its version 4, and lm-eval
refuses tasks that execute what the model writes. The task files themselves may name Python code:
those of lm-eval are installed with it, and those of `evaluation.task_folder` are the user's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selm_jax.config import Evaluation
from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.lm_eval import adapter
from selm_jax.evaluation.benchmarks.lm_eval import tasks as lm_eval_tasks
from selm_jax.policy.policy import Policy
from selm_jax.shell.shared_stages import key_of
from selm_jax.tables.task_scores import Row


@dataclass(frozen=True)
class Tasks:
    """The loaded tasks of an experiment, with their data.

    Attributes:
      tasks, manager: lm-eval's own objects.
    """

    settings: Evaluation
    seed: int
    tasks: list[Any]
    manager: Any

    def measure(self, policy: Policy, bar: adapter.Bar = adapter.no_bar) -> list[Row]:
        """Returns a model's score of every question in every measure of every task.

        It is the same each time, because the seeds of shots and of samples are set each time.

        Raises:
          EvaluationError: a task does not fit the model; the message says which and why.
        """
        results = adapter.evaluated(
            adapter.Harness(policy.fitting(), self.seed, bar), self.tasks, self.manager,
            chat=self.settings.task_chat, limit=self.settings.task_limit, bootstrap_iters=0,
            log_samples=True,
        )  # fmt: skip
        return [row for task in self.tasks for row in _rows(task, results)]


def load(settings: Evaluation, seed: int) -> Tasks:
    """Loads the tasks that `evaluation.tasks` names, and their data.

    Raises:
      EvaluationError: a task is unknown, is a group of tasks, runs the model's code or reads images
        or sounds; its data cannot be loaded; or lm-eval would give no results in this process.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        raise EvaluationError(
            "lm-eval gives results only where LOCAL_RANK is 0. Unset LOCAL_RANK, which "
            "selm_jax does not use, and start the run again"
        )
    folder, adds = settings.task_folder, "evaluation.task_folder"
    manager = lm_eval_tasks.manager(None if folder is None else Path(folder).absolute(), adds)
    shots = lm_eval_tasks.tasks_of(settings.tasks, manager, "evaluation.tasks", adds)
    single = set(manager.all_subtasks)
    if groups := [name for name in shots if name not in single]:
        raise EvaluationError(
            f"evaluation.tasks: {', '.join(groups)} stands for several tasks. Name single tasks "
            "here; `selm eval lm_eval` measures groups as well"
        )
    return Tasks(settings, seed, lm_eval_tasks.load_tasks(shots, manager), manager)


def _rows(task: Any, results: Mapping[str, Any]) -> Iterator[Row]:
    """Yields the scores of one task, by measure and then by question."""
    from lm_eval.api.metrics import mean  # it is installed if the module `adapter` is imported

    name = task.config.task
    better = results["higher_is_better"].get(name, {})
    for key, value in results["results"][name].items():
        measure, _, kind = key.partition(",")  # such as "exact_match,strict-match"
        if not kind or measure.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label, higher = measure if kind == "none" else key, better.get(measure)
        if task.aggregation().get(measure) is not mean:
            yield Row(name, label, None, "", float(value), higher)
            continue
        for sample in results["samples"][name]:
            if sample["filter"] == kind and measure in sample["metrics"]:
                # The doc has more than the prompt, and the target may come from the task's code.
                asked = key_of(**{k: sample[f"{k}_hash"] for k in ("doc", "prompt", "target")})
                yield Row(name, label, sample["doc_id"], asked, float(sample[measure]), higher)
