"""Loads tasks of lm-eval; checks names, data and numbers of few-shot examples before any work."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from selm_jax.evaluation import EvaluationError
from selm_jax.shell.words import did_you_mean

# Table 2 of the paper and its caption: task -> shots. GSM8K with CoT is the harness's `gsm8k_cot`;
# the paper's single number for TruthfulQA is mc2, as on the leaderboard at the time.
PAPER = {
    "gsm8k_cot": 8,
    "hellaswag": 10,
    "arc_challenge": 25,
    "truthfulqa_mc2": 0,
    "eq_bench": 0,
    "openbookqa": 10,
}
_RUNS_CODE = "runs code that the model writes, which is never done here"


def tasks_of(
    names: Iterable[str], manager: TaskManager, given: str = "--tasks", adds: str = "--include"
) -> dict[str, int | None]:
    """Parses names `NAME[:SHOTS]` into shots by task; `paper` stands for the paper's six tasks.

    Without SHOTS the value is None, for the task's own number.

    Args:
      given, adds: the options or settings that name the tasks and a folder of further ones.

    Raises:
      EvaluationError: a name is unknown or appears twice, shots are not a number, or there is no
        task.
    """
    found: list[tuple[str, int | None]] = []
    for part in filter(None, map(str.strip, names)):
        if part == "paper":
            found += PAPER.items()
            continue
        name, colon, shots = part.partition(":")
        if name not in manager.all_tasks:
            raise EvaluationError(
                f"lm-eval {version()} has no task {name!r}{did_you_mean(name, manager.all_tasks)} "
                f"`paper` stands for the paper's six tasks; {adds} adds your own folder (YAML)"
            )
        if colon and not shots.isdecimal():
            raise EvaluationError(
                f"{given} {part}: {shots!r} is not a number of shots; expected a whole number"
            )
        found.append((name, int(shots) if colon else None))
    every = [name for name, _ in found]
    if twice := {name for name in every if every.count(name) > 1}:
        raise EvaluationError(f"{given} has {', '.join(sorted(twice))} twice; give each once")
    if not found:
        raise EvaluationError(
            f"{given} is empty; expected names of tasks, or `paper` for the paper's six"
        )
    return dict(found)


def load_tasks(shots: dict[str, int | None], manager: TaskManager) -> list[Any]:
    """Loads tasks (or groups of tasks) with their data and shots.

    Raises:
      EvaluationError: data cannot be loaded, a task is in two of the names, there are fewer rows
        than shots, or a task runs the model's code or reads images or sounds.
    """
    out, named = [], {}
    for name, written in _files(list(shots), manager):
        # Loading the task would already download the code of its metric, and run it.
        if written.get("unsafe_code"):
            raise _refused(name, _RUNS_CODE)
    for name, count in shots.items():
        try:
            loaded: Any = manager.load([name])
        # The `datasets` library raises many kinds: network, a missing file, a bad row.
        except Exception as error:
            raise EvaluationError(
                f"task {name}: its data could not be loaded: {type(error).__name__}: {error}. "
                "Check the network and the task's file"
            ) from error
        for task in loaded["tasks"].values() if count is not None else ():
            task.set_config(key="num_fewshot", value=count)
        for member, task in loaded["tasks"].items():
            if (other := named.setdefault(member, name)) != name:
                raise EvaluationError(
                    f"task {member}: both {other} and {name} stand for it. Name one of them"
                )
            _check_kind(task)
            _check_shots(task)
        groups = loaded["groups"]
        out += [groups[name]] if name in groups else loaded["tasks"].values()
    return out


def _files(asked: Any, manager: TaskManager) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the names and files of tasks, groups and tags, and of all tasks that belong to them.

    Args:
      asked: a name, a member as a group's file writes it, or a list of such.
    """
    if isinstance(asked, list):
        for each in asked:
            yield from _files(each, manager)
    elif isinstance(asked, dict):
        name = asked.get("task", asked.get("group"))
        if isinstance(name, str):  # what is written here is handed down to the task
            yield name, asked
        yield from _files(name, manager)
    elif (entry := manager.task_index.get(asked)) is not None:
        file = entry.cfg or {"task": sorted(entry.tags)}  # a tag has no file
        yield asked, file
        if isinstance(file.get("task"), list):
            yield from _files(file["task"], manager)


def _check_kind(task: Any) -> None:
    """Refuses what the harness itself refuses only when it evaluates."""
    for mark, what in (
        ("UNSAFE_CODE", _RUNS_CODE),
        ("MULTIMODAL", "shows images or plays sounds, but this engine reads only text"),
    ):
        if getattr(task, mark, False):
            raise _refused(task.config.task, what)


def _refused(name: str, what: str) -> EvaluationError:
    return EvaluationError(f"task {name}: it {what}. Leave this task out")


def _check_shots(task: Any) -> None:
    """Checks a task's number of few-shot examples; the harness does so only at the first row."""
    name, shots = task.config.task, task.config.num_fewshot or 0
    if shots and task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise EvaluationError(
            f"task {name}: it scores whole texts and cannot have shots; found {shots}. Use {name}:0"
        )
    sampler = getattr(task, "sampler", None)
    if not shots or sampler is None:
        return
    # A question that is among these rows cannot be a shot for itself.
    itself = task.fewshot_cfg.split == task.config.test_split
    rows = len(sampler.fewshot_docs()) - itself
    if shots > rows:
        raise EvaluationError(
            f"task {name}: {shots} shots, but there are only {rows} rows for them"
            f"{' besides the question itself' if itself else ''}. Use at most {name}:{max(rows, 0)}"
        )


def manager(include: Path | None, adds: str = "--include") -> TaskManager:
    if include is not None and not include.is_dir():
        raise EvaluationError(f"{adds} {include}: this folder does not exist. Correct the path")
    return TaskManager(include_path=None if include is None else str(include))


def version() -> str:
    return importlib.metadata.version("lm-eval")
