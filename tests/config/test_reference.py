"""The reference of settings: complete, with the defaults that an experiment really has."""

import dataclasses

import pytest

from selm_jax.config import as_dict, parse, plain_yaml
from selm_jax.config.reference import numbers_of, reference, sections
from selm_jax.shell.ranges import Range

GIVEN = {
    "output": "runs/a",
    "iterations": 1,
    "model": {"source": "m"},
    "data": {"train": "d", "chosen": "c", "rejected": "r"},
    "objective": {"loss": "dpo"},
    "training": {"learning_rate": 1e-6, "global_batch": 4},
}
SETTINGS = [(section, each) for section in sections() for each in reference(section)]


def read(tree, key):
    for part in key.split("."):
        tree = tree[part]
    return tree


NOT_SET = ("lora", "rollout.remote", "rollout.mixture", "training.importance")


def test_the_reference_has_every_setting_of_an_experiment():
    tree = as_dict(parse(GIVEN))
    listed = {setting.key for _, setting in SETTINGS}
    flat, todo = set(), [("", tree)]
    while todo:
        prefix, group = todo.pop()
        for name, value in group.items():
            flat.add(f"{prefix}{name}")
            if f"{prefix}{name}" in sections() and value is not None:
                todo.append((f"{prefix}{name}.", value))
    assert flat <= listed
    assert {key.rpartition(".")[0] for key in listed - flat} <= set(NOT_SET)


def test_a_default_is_what_an_experiment_has_that_does_not_set_it():
    tree = as_dict(parse(GIVEN))
    checked = 0
    for section, setting in SETTINGS:
        if (
            not setting.default
            or section in NOT_SET
            or setting.key in ("data.chosen", "data.rejected")
        ):
            continue
        assert plain_yaml.scalar(setting.default) == read(tree, setting.key) or setting.default in (
            '""',
            str(read(tree, setting.key)),
        ), setting.key
        checked += 1
    assert checked > 60


def test_what_must_be_given_has_no_default():
    required = {setting.key for _, setting in SETTINGS if setting.default is None}
    assert required >= {"output", "iterations", "model.source", "data.train", "lora.rank"}
    assert "seed" not in required


def test_every_setting_has_a_sentence():
    for _, setting in SETTINGS:
        assert setting.key in sections() or setting.text, setting.key


def test_an_unknown_section_is_refused():
    with pytest.raises(KeyError):
        list(reference("trainning"))


def test_the_numbers_of_a_function_have_their_ranges_and_defaults():
    def loss(beta, alpha=0.5, name="x"):
        return beta, alpha, name

    both = list(numbers_of(loss, {"beta": Range(0, above=True), "alpha": Range(0, 1)}))
    assert [(s.key, s.default) for s in both] == [("beta", None), ("alpha", "0.5")]
    assert both[0].values == "a number above 0"
    assert dataclasses.asdict(both[1])["values"] == "a number from 0 to 1"
