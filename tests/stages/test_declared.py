"""A stage reads only the settings that it declares, and these are recorded."""

from __future__ import annotations

import dataclasses

import pytest
import tiny

from selm_jax import config
from selm_jax.run.task import task_of
from selm_jax.stages.declared import (
    ADDED,
    FREE,
    Declared,
    DeclaredTask,
    UndeclaredSetting,
    recorded,
)

TASK = task_of({"loss": "selm", "beta": 0.1, "alpha": 0.01})


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("declared")
    return config.load(tiny.experiment(folder, feedback={"ranker": "length", "settings": {}}))


def test_a_declared_setting_is_the_experiments(experiment):
    settings = Declared("score", experiment, frozenset({"training.rows", "text", "seed"}))
    assert settings.training.rows == experiment.training.rows
    assert settings.text is experiment.text
    assert settings.seed == experiment.seed


@pytest.mark.parametrize("path", ["training.row_length", "rollout", "objective", "lora"])
def test_any_other_setting_is_refused(experiment, path):
    settings = Declared("score", experiment, frozenset({"training.rows", "text"}))
    with pytest.raises(UndeclaredSetting, match=f"'score' reads the setting {path}"):
        found = settings
        for name in path.split("."):
            found = getattr(found, name)


def test_a_group_that_is_not_there_is_none(experiment):
    assert experiment.lora is None
    assert Declared("score", experiment, frozenset({"lora.base"})).lora is None


def test_of_an_open_group_only_the_declared_keys_are_read(experiment):
    settings = Declared("evaluate", experiment, frozenset({"objective.beta"}))
    assert settings.objective == {"beta": 0.1}


def test_every_declared_setting_is_recorded_unless_it_changes_nothing(experiment):
    found = recorded(experiment, TASK, frozenset({"rollout", "seed", "text.layout"}), 1)
    names = {f"rollout.{field.name}" for field in dataclasses.fields(experiment.rollout)}
    assert set(found) == (names | {"seed", "text.layout"}) - FREE - set(ADDED)


def test_what_is_recorded_of_the_learning_rate_is_the_iterations(experiment):
    found = [recorded(experiment, TASK, frozenset({"training.learning_rate"}), t) for t in (1, 2)]
    assert [each["training.learning_rate"] for each in found] == [1e-3, 5e-4]


def test_what_is_recorded_of_alpha_is_the_iterations(tmp_path):
    """So later values may still change, and a sweep's runs share the iterations before."""
    selm = {"loss": "selm", "beta": 0.1}
    found = []
    for alpha in (0.01, [0.01], [0.01, 0.005]):
        e = config.load(tiny.experiment(tmp_path, objective=selm | {"alpha": alpha}))
        keys = frozenset({"objective"})
        found += [recorded(e, TASK, keys, t)["objective.alpha"] for t in (1, 2)]
    assert found == [0.01, 0.01, 0.01, 0.01, 0.01, 0.005]


@pytest.mark.parametrize(
    ("declares", "reads", "key"),
    [
        ("objective.reference_free", "candidate_ids", "objective.rates"),
        ("objective.rates", "reference_free", "objective.reference_free"),
        ("objective.rates", "objective", "objective"),
        ("objective.beta", "objective", "objective"),
    ],
)
def test_an_undeclared_setting_of_the_task_is_refused(declares, reads, key):
    with pytest.raises(UndeclaredSetting, match=f"'score' reads the setting {key}, which"):
        getattr(DeclaredTask("score", TASK, frozenset({declares})), reads)


def test_the_declared_task_is_the_experiments():
    task = DeclaredTask("score", TASK, frozenset({"objective"}))
    assert task.objective is TASK.objective and task.candidate_ids == TASK.candidate_ids
