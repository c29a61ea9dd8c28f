"""Tasks of the language model evaluation harness: names, data and shots, checked before any work."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from selm_jax.evaluation import EvaluationError
from selm_jax.shell.words import did_you_mean

# Table 2 of the paper and its caption: task -> shots. CoT of GSM8K is the harness's `gsm8k_cot`;
# the paper's single number of TruthfulQA is mc2, as on the leaderboard of its time.
PAPER = {
    "gsm8k_cot": 8,
    "hellaswag": 10,
    "arc_challenge": 25,
    "truthfulqa_mc2": 0,
    "eq_bench": 0,
    "openbookqa": 10,
}


def tasks_of(text: str, manager: TaskManager) -> dict[str, int | None]:
    """Shots by task of `NAME[:SHOTS],...`, None as the task has them; `paper` stands for six.

    Raises:
      EvaluationError: a name that the harness does not know, or twice the same; shots that are no
        number, or nothing.
    """
    found: list[tuple[str, int | None]] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        if part == "paper":
            found += PAPER.items()
            continue
        name, colon, shots = part.partition(":")
        if name not in manager.all_tasks:
            raise EvaluationError(
                f"lm-eval {version()} knows no task {name!r}{did_you_mean(name, manager.all_tasks)} "
                "`paper` stands for the paper's six; --include adds a folder of your own (YAML)"
            )
        if colon and not shots.isdecimal():
            raise EvaluationError(f"--tasks {part}: {shots!r} shots; a whole number was expected")
        found.append((name, int(shots) if colon else None))
    names = [name for name, _ in found]
    if twice := {n for n in names if names.count(n) > 1}:
        raise EvaluationError(f"--tasks names {', '.join(sorted(twice))} twice")
    if not found:
        raise EvaluationError("--tasks names none; `paper` stands for the paper's six")
    return dict(found)


def load_tasks(shots: dict[str, int | None], manager: TaskManager) -> list[Any]:
    """Tasks (or groups of them) with their data and shots.

    Raises:
      EvaluationError: data that cannot be had, or more shots than there are rows to take them from.
    """
    out = []
    for name, count in shots.items():
        try:
            loaded: Any = manager.load([name])
        # Whatever the library of data sets raises: the network, a missing file, a bad row.
        except Exception as error:
            raise EvaluationError(
                f"task {name}: its data could not be loaded: {type(error).__name__}: {error}"
            ) from error
        for task in loaded["tasks"].values() if count is not None else ():
            task.set_config(key="num_fewshot", value=count)
        for task in loaded["tasks"].values():
            _check_shots(task)
        groups = loaded["groups"]
        out += [groups[name]] if name in groups else loaded["tasks"].values()
    return out


def _check_shots(task: Any) -> None:
    """Finds what the harness would notice at the first row, with a traceback."""
    name, shots = task.config.task, task.config.num_fewshot or 0
    if shots and task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise EvaluationError(f"task {name}: whole texts take no shots; {shots} were asked for")
    sampler = getattr(task, "sampler", None)
    if not shots or sampler is None:
        return
    # A question that is itself among the rows is no shot for itself.
    itself = task.fewshot_cfg.split == task.config.test_split
    rows = len(sampler.fewshot_docs()) - itself
    if shots > rows:
        raise EvaluationError(
            f"task {name}: {shots} shots, but there are {rows} rows to take them from"
            f"{' besides the question itself' if itself else ''}. Ask for fewer: {name}:{max(rows, 0)}"
        )


def manager(include: Path | None) -> TaskManager:
    if include is not None and not include.is_dir():
        raise EvaluationError(f"--include {include}: no such folder")
    return TaskManager(include_path=None if include is None else str(include))


def version() -> str:
    return importlib.metadata.version("lm-eval")
