"""The protocol of rankers, their builder and the check of scores."""

import importlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.feedback import ranker
from selm_jax.feedback.ranker import FeedbackError, Question, build_ranker, check_scores


def question(prompt="Q?", id="p0", **row):
    return Question(prompt=prompt, messages=(), row=row, id=id)


TWO = [question(id="p0"), question(id="p1")]
RAGGED = [["a", "b"], ["c"]]


def test_every_built_in_name_has_a_builder():
    for place in ranker.BUILT_IN.values():
        module, _, attribute = place.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute))
    settings = {
        "sentiment": {},
        "length": {},
        "regex": {"pattern": "a"},
        "judge": {"model": "m", "base_url": "http://127.0.0.1:9/v1"},
        "mixture": {"parts": [{"ranker": "length"}]},
    }
    for name, of_name in settings.items():
        assert build_ranker(name, **of_name).name == name


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("sentimet", "sentiment"), ("Length", "length"), ("regexp", "regex"), ("len", "length")],
)
def test_unknown_name_suggests_the_nearest(wrong, right):
    with pytest.raises(FeedbackError, match=f"unknown ranker '{wrong}'; did you mean '{right}'"):
        build_ranker(wrong)


def test_a_name_near_nothing_still_lists_what_there_is():
    with pytest.raises(FeedbackError) as caught:
        build_ranker("zzzz")
    assert "did you mean" not in str(caught.value)
    for name in [*ranker.BUILT_IN, "package.module:function"]:
        assert name in str(caught.value)


def test_settings_are_checked():
    with pytest.raises(FeedbackError, match="unknown setting 'targt'; did you mean 'target'"):
        build_ranker("length", targt=3)
    with pytest.raises(FeedbackError, match="unknown setting 'x'.*no settings"):
        build_ranker("sentiment", x=1)
    with pytest.raises(FeedbackError, match="'pattern' is missing"):
        build_ranker("regex")
    with pytest.raises(FeedbackError, match="unknown setting 'scale'.*one of 'workers'"):
        build_ranker("my_rules:polite", scale=2)


def test_a_ranker_may_tell_of_its_work():
    class Telling:
        name = "telling"

        def scores(self, questions, candidates):
            return []

        def report(self):
            return {"asked": 3}

    assert ranker.reported(Telling()) == {"asked": 3}
    assert ranker.reported(build_ranker("length")) == {}


def test_building_one_rule_does_not_load_another_rules_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    assert build_ranker("length").scores([question()], [["abc"]])[0].tolist() == [3.0]
    with pytest.raises(FeedbackError, match="pip install vaderSentiment"):
        build_ranker("sentiment")


@pytest.mark.parametrize(
    "rows",
    [
        [[1, True], [2.5]],
        [(np.float32(1), np.bool_(1)), np.array([2.5])],
        [np.array([1, 1], np.int32), [np.array(2.5)]],
        [jnp.array([1.0, 1.0]), jnp.array([2.5])],
    ],
)
def test_whatever_is_a_number_comes_out_as_float64(rows):
    first, second = check_scores("r", TWO, RAGGED, rows)
    assert first.dtype == second.dtype == np.float64
    assert first.tolist() == [1.0, 1.0] and second.tolist() == [2.5]


def test_a_checked_row_is_a_copy():
    row = np.array([1.0, 2.0])
    (checked,) = check_scores("r", TWO[:1], RAGGED[:1], [row])
    row[0] = 9.0
    assert checked.tolist() == [1.0, 2.0]


def test_no_prompts_and_no_candidates_are_no_fault():
    assert check_scores("r", [], [], []) == []
    assert check_scores("r", TWO[:1], [[]], [[]])[0].shape == (0,)


@pytest.mark.parametrize(
    "bad",
    [float("nan"), float("inf"), -np.inf, None, "1.0", [1.0], np.zeros(1), 1j, [[1], [1, 2]], {}],
)
def test_a_bad_score_names_ranker_prompt_and_candidate(bad):
    with pytest.raises(FeedbackError, match="ranker 'r', prompt 'p0', candidate 1: the score is"):
        check_scores("r", TWO, RAGGED, [[0.0, bad], [0.0]])


@pytest.mark.parametrize(
    "row", [[0.0], [0.0, 1.0, 2.0], 0.5, None, "ab", np.float64(1), np.zeros(3), {0: 1.0, 1: 2.0}]
)
def test_a_row_of_the_wrong_shape_names_the_prompt(row):
    with pytest.raises(FeedbackError, match="ranker 'r', prompt 'p0': .* each of its 2 candidates"):
        check_scores("r", TWO, RAGGED, [row, [0.0]])


def test_prompts_candidates_and_rows_must_be_as_many():
    with pytest.raises(FeedbackError, match="2 questions and 1 lists"):
        check_scores("r", TWO, RAGGED[:1], [[0.0, 1.0]])
    with pytest.raises(FeedbackError, match="returned scores for 1 of 2 prompts"):
        check_scores("r", TWO, RAGGED, [[0.0, 1.0]])


def test_one_string_is_not_a_list_of_candidates():
    with pytest.raises(FeedbackError, match="prompt 'p1': the candidates are one string"):
        build_ranker("length").scores(TWO, [["a", "b"], "cd"])
