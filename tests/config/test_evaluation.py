"""The settings of the capability guard's tasks: how they are written, and what is refused."""

import pytest
import yaml
from smallest import TREE

from selm_jax.config import ConfigError, dump, parse
from selm_jax.config.reference import reference


def experiment(evaluation, heldout="h.jsonl"):
    return parse(
        TREE | {"data": {"train": "t.jsonl", "heldout": heldout}, "evaluation": evaluation}
    )


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("arc_easy", ("arc_easy",)),
        (["arc_easy", "hellaswag:10"], ("arc_easy", "hellaswag:10")),
        ([], ()),
    ],
)
def test_one_task_or_several_are_read_and_written_again(written, read):
    e = experiment({"tasks": written})
    assert e.evaluation.tasks == read
    assert parse(yaml.safe_load(dump(e))) == e


@pytest.mark.parametrize(
    ("evaluation", "heldout", "message"),
    [
        ({"tasks": ["a"]}, None, "evaluation.tasks: they are measured with the held-out data"),
        ({"task_limit": 3}, "h", "evaluation.task_limit: it has no effect without"),
        ({"task_folder": "f"}, "h", "evaluation.task_folder: it has no effect without"),
        ({"task_chat": False}, "h", "evaluation.task_chat: it has no effect without"),
        ({"tasks": ["a", "b,c"]}, "h", r"evaluation.tasks.1: 'b,c'; the name of one task"),
        ({"tasks": ["a"], "task_limit": 0}, "h", "evaluation.task_limit"),
        ({"tasks": [3]}, "h", "evaluation.tasks"),
    ],
)
def test_what_is_refused(evaluation, heldout, message):
    with pytest.raises(ConfigError, match=message):
        experiment(evaluation, heldout)


def test_the_reference_says_that_it_is_a_list():
    found = {each.key: each for each in reference("evaluation")}["evaluation.tasks"]
    assert (found.values, found.default) == ("text, or a list of such", "[]")
