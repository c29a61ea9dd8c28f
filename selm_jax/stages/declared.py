"""Gives a stage access to the settings that it declares, and to no others.

A stage declares its settings once, for `stage.json`. It reads the experiment through `Declared`,
which refuses every other setting, so it cannot depend on a setting that is not recorded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from selm_jax.config import Experiment, as_dict, objective_at, user_code_in
from selm_jax.run.task import Task
from selm_jax.shell.user_code import source_digest

# Settings that do not change the outcome: how the work is divided, when a run stops, how a judge is
# reached and what it may cost, and (`workers`) how many processes run a rule.
FREE = frozenset(
    {
        *("rollout.slots", "rollout.prefill_rows", "feedback.prompts_per_part"),
        "rollout.gap",
        *("training.checkpoint_every", "training.checkpoints_kept", "training.on_nonfinite"),
    }
)
# Settings that earlier versions did not have, with what these did. They are recorded only if they
# are something else, so that folders of earlier versions go on.
ADDED = {
    "data.bonus": None,
    "model.keep_vision": True,
    "training.token_statistics": False,
    "training.router": "frozen",
    "training.importance": None,
    "lora.experts": False,
    "rollout.mixture": None,
    "rollout.weights": "full",
    "evaluation.tasks": [],
    "evaluation.task_limit": None,
    "evaluation.task_folder": None,
    "evaluation.task_chat": True,
}
FREE_OF_RANKERS = frozenset(
    {
        *(
            "concurrency",
            "timeout",
            "retries",
            "backoff",
            "cache",
            "base_url",
            "key_env",
            "workers",
        ),
        *("max_total_tokens", "max_cost", "price_prompt", "price_completion"),
    }
)


_OF_TASK = (
    *("objective.rates", "objective.reference_free"),
    *("objective.start_share", "objective.uses_shared"),
)


class UndeclaredSetting(Exception):
    """A stage read a setting that it does not declare. This is a bug in the stage."""


class Declared:
    """Lets a stage read the settings that it declares, as in `declared.training.rows`.

    Args:
      keys: dotted keys; a group includes all its settings.
    """

    def __init__(self, stage: str, group: Any, keys: frozenset[str], prefix: str = ""):
        self._stage, self._group, self._keys, self._prefix = stage, group, keys, prefix

    def __getattr__(self, name: str) -> Any:
        key = self._prefix + name
        if _covers(self._keys, key):
            return getattr(self._group, name)
        within = [each for each in self._keys if each.startswith(key + ".")]
        if not within:
            raise _undeclared(self._stage, key)
        value = getattr(self._group, name)
        if isinstance(value, Mapping):
            return {k: v for k, v in value.items() if f"{key}.{k}" in within}
        if dataclasses.is_dataclass(value):
            return Declared(self._stage, value, self._keys, key + ".")
        return value  # None: the experiment does not have this group


class DeclaredTask:
    """The attributes of the task that a stage may read, given the settings that it declares."""

    def __init__(self, stage: str, task: Task, keys: frozenset[str]):
        self._stage, self._task, self._keys = stage, task, keys

    def __getattr__(self, name: str) -> Any:
        own = name if name == "objective" else f"objective.{name}"
        key = own if own in ("objective", *_OF_TASK) else _OF_TASK[0]
        if not _covers(self._keys, key):
            raise _undeclared(self._stage, key)
        return getattr(self._task, name)


def recorded(experiment: Experiment, task: Task, keys: frozenset[str], t: int) -> dict[str, Any]:
    """The declared settings of iteration t by dotted key, as `stage.json` records them.

    Properties of the objective, such as `objective.rates`, are recorded only if they are not 0.
    """
    tree, found = as_dict(experiment), {}
    tree["feedback"]["settings"] = _without(tree["feedback"]["settings"], FREE_OF_RANKERS)
    if (server := tree["rollout"]["remote"]) is not None:
        tree["rollout"]["remote"] = server["engine"]  # its address may change
    for key in sorted(keys):
        if key in _OF_TASK:
            value = getattr(task, key.removeprefix("objective."))
            found |= {key: value} if value else {}
            continue
        value: Any = tree
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None  # None: no such group
        if isinstance(value, dict):
            found |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            found[key] = value
    if "training.learning_rate" in found:
        found["training.learning_rate"] = experiment.learning_rate(t)
    if "objective.alpha" in found:
        found["objective.alpha"] = objective_at(experiment.objective, t)["alpha"]
    if t == 1:  # both are the start model
        found.pop("training.reference_policy", None)
    found = {k: v for k, v in found.items() if k not in ADDED or v != ADDED[k]}
    return {k: v for k, v in found.items() if not _covers(FREE, k)}


def sources(experiment: Experiment, keys: frozenset[str]) -> dict[str, str]:
    """Digests of the source files of the user's functions that the declared settings name."""
    return {
        f"{key} {name}": source_digest(name)
        for key, name in user_code_in(experiment)
        if _covers(keys, key)
    }


def _covers(keys: frozenset[str], key: str) -> bool:
    """Returns whether the setting `key`, or a group of settings that contains it, is in `keys`."""
    return any(key == each or key.startswith(each + ".") for each in keys)


def _undeclared(stage: str, key: str) -> UndeclaredSetting:
    return UndeclaredSetting(
        f"stage {stage!r} reads the setting {key}, which it does not declare. Add it to the "
        "stage's `settings`, so that changes to it are noticed"
    )


def _without(tree: Any, keys: frozenset[str]) -> Any:
    """A copy of nested lists and dictionaries without the keys `keys`."""
    if isinstance(tree, dict):
        return {k: _without(v, keys) for k, v in tree.items() if k not in keys}
    return [_without(x, keys) for x in tree] if isinstance(tree, list) else tree
