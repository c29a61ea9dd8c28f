"""The two tasks: which one a loss belongs to, and what each provides."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny

from selm_jax import config
from selm_jax.models.families import from_hf, read_config
from selm_jax.run.rows import RunError
from selm_jax.run.task import LanguageModel, RewardModel, Sizes, Task, task_of

SELM = {"loss": "selm", "beta": 0.1, "alpha": 0.01}


@pytest.mark.parametrize(
    ("objective", "kind"),
    [
        (SELM, LanguageModel), ({"loss": "sft"}, LanguageModel),
        ({"loss": "bradley_terry"}, RewardModel),
    ],
)  # fmt: skip
def test_the_loss_decides(objective, kind):
    task = task_of(objective)
    assert type(task) is kind
    assert task.rates is task.objective.rates is not task.answers
    assert task.reference_free is task.objective.reference_free


def test_both_tasks_provide_the_same_things():
    def says(kind):
        return {name for name in dir(kind) if not name.startswith("_")}

    assert (
        says(LanguageModel)
        == says(RewardModel)
        == says(Task) | {*("rates", "trains", "answers", "pipeline")}
    )


@pytest.fixture
def files(tmp_path):
    e = config.load(tiny.experiment(tmp_path, iterations=1, training__learning_rate=1e-3))
    return e, tmp_path / "model" / "config.json"


def test_a_reward_model_may_start_from_a_language_model_and_not_the_other_way(files, tmp_path):
    _, file = files
    stored = read_config(file.parent)
    made = task_of({"loss": "bradley_terry"}).facts(stored, file, lambda: 1)
    assert stored.head is None and made.head is not None
    assert dataclasses.replace(made, head=None, architecture=stored.architecture) == stored
    assert task_of(SELM).facts(stored, file, lambda: 1) is stored
    with pytest.raises(RunError, match="is a reward model and cannot generate text, but objective"):
        task_of(SELM).facts(made, file, lambda: 1)


def test_the_sizes_of_a_plan_bound_those_of_its_run(files):
    e, file = files
    facts = from_hf(json.loads(file.read_text()))
    for objective in (SELM, {"loss": "bradley_terry"}):
        task = task_of(objective)
        most, run = task.largest(e, facts), task.sizes(e, facts, 10, lambda: 20)
        assert run.longest_prompt <= most.longest_prompt == e.rollout.max_prompt_tokens
        assert run.longest_sequence <= most.longest_sequence
    assert task_of(SELM).sizes(e, facts, 10, lambda: 20) == Sizes(10, 10 + e.rollout.max_new_tokens)
