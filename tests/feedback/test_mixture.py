"""Mixtures of rankers: scales per prompt and weighted sums, for all scores."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from selm_jax.feedback import mixture
from selm_jax.feedback.mixture import SCALES, Mixture, Part
from selm_jax.feedback.ranker import (
    FeedbackError,
    Question,
    build_ranker,
    check_scores,
    is_relative,
    prompts_together,
    reported,
)

ANY = st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=8).map(
    lambda x: np.array(x, np.float64)
)
CALM = st.lists(st.integers(-999, 999).map(lambda n: n / 8), min_size=2, max_size=8).map(
    lambda x: np.array(x, np.float64)
)


def question(id="p0"):
    return Question(prompt="Q?", messages=(), row={}, id=id)


@given(ANY)
@pytest.mark.parametrize("name", SCALES)
def test_any_finite_scores_stay_finite_and_in_order(name, scores):
    found = SCALES[name](scores)
    assert found.shape == scores.shape and np.isfinite(found).all()
    order = np.argsort(scores, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    if len(scores) and scores.min() < scores.max():
        assert found[scores.argmin()] < found[scores.argmax()]


@given(CALM, st.integers(1, 9), st.integers(-99, 99))
@pytest.mark.parametrize("name", ["zscore", "minmax", "rank"])
def test_unit_and_offset_of_a_ranker_do_not_matter(name, scores, unit, offset):
    np.testing.assert_allclose(
        SCALES[name](scores * unit + offset), SCALES[name](scores), atol=1e-9
    )


@given(CALM)
def test_same_as_the_slow_obvious_forms(scores):
    n = len(scores)
    beats = [sum(float(a > b) + (a == b) / 2 for b in scores) - 0.5 for a in scores]
    np.testing.assert_allclose(mixture.rank(scores), np.array(beats) / (n - 1))
    np.testing.assert_allclose(mixture.rank(scores), (stats.rankdata(scores) - 1) / (n - 1))
    if scores.std():
        np.testing.assert_allclose(mixture.zscore(scores), stats.zscore(scores), atol=1e-9)
        spread = scores.max() - scores.min()
        np.testing.assert_allclose(mixture.minmax(scores), (scores - scores.min()) / spread)


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 6))
def test_equal_scores_say_nothing(value, count):
    scores = np.full(count, value)
    assert (mixture.zscore(scores) == 0).all()
    assert (mixture.minmax(scores) == 0.5).all() and (mixture.rank(scores) == 0.5).all()


class Fixed:
    """A ranker whose scores are given."""

    name = "fixed"

    def __init__(self, *rows):
        self.rows = rows

    def scores(self, questions, candidates):
        return check_scores(self.name, questions, candidates, self.rows)


class Counting(Fixed):
    name = "counting"

    def report(self):
        return {"asked": len(self.rows)}


@given(CALM, CALM, st.floats(-5, 5), st.floats(-5, 5), st.data())
def test_the_weighted_sum_of_each_prompt_alone(first, second, a, b, data):
    one, two = data.draw(st.sampled_from([*SCALES])), data.draw(st.sampled_from([*SCALES]))
    rows = [first, second]
    other = [row[::-1] ** 2 for row in rows]
    parts = (Part(Fixed(*rows), a, one), Part(Fixed(*other), b, two))
    texts = [["x"] * len(row) for row in rows]
    found = Mixture(parts).scores([question("p"), question("q")], texts)
    for scores, row, squared in zip(found, rows, other, strict=True):
        np.testing.assert_allclose(scores, a * SCALES[one](row) + b * SCALES[two](squared))


def test_built_from_settings_and_nested():
    inner = {"parts": [{"ranker": "length"}, {"ranker": "regex", "settings": {"pattern": "a"}}]}
    parts = [
        {"ranker": "length", "settings": {"target": 3}, "weight": 2, "normalise": "rank"},
        {"ranker": "mixture", "settings": inner, "weight": -1},
    ]
    ranker = build_ranker("mixture", **json.loads(json.dumps({"parts": parts})))
    (scores,) = ranker.scores([question()], [["aaa", "bb", "a"]])
    assert scores.tolist() == [2.0 - 6.0, 1.0 - 2.0, 0.0 - 2.0]
    assert ranker.name == "mixture" and reported(ranker) == {}


def test_tells_what_its_parts_tell():
    parts = tuple(Part(each, 1.0, "none") for each in (Fixed([0.0]), Counting([1.0])))
    ranker = Mixture((*parts, Part(Mixture(parts), 1.0, "none")))
    assert ranker.scores([question()], [["x"]])[0].tolist() == [2.0]
    assert ranker.report() == {"2.counting/asked": 1, "3.mixture/2.counting/asked": 1}


def test_reads_prompts_in_groups_that_cut_none_of_its_parts():
    pairs, eights = Fixed([0.0]), Fixed([0.0])
    pairs.together, eights.together = 2, 8
    alone, *parts = (Part(each, 1.0, "none") for each in (Fixed([0.0]), pairs, eights))
    assert prompts_together(Mixture((alone,))) == 1
    assert prompts_together(Mixture((alone, *parts))) == 8


def test_is_relative_if_a_part_is_or_its_scale_makes_it():
    one = {"ranker": "length"}
    judge = {"ranker": "judge", "settings": {"model": "m", "base_url": "http://h/v1"}}
    rating = judge | {"settings": judge["settings"] | {"form": "pointwise"}}
    for parts, relative in (
        ([one], False), ([one, judge], True), ([rating], False),
        ([one | {"normalise": "rank"}], True),
    ):  # fmt: skip
        assert is_relative(build_ranker("mixture", parts=parts)) == relative


def test_a_sum_that_overflows_is_an_error():
    parts = (Part(Fixed([1e308]), 10.0, "none"),)
    with np.errstate(over="ignore"), pytest.raises(FeedbackError, match="'mixture'.*score is inf"):
        Mixture(parts).scores([question()], [["x"]])


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ([], "expected a list of at least one"),
        ({"ranker": "length"}, "expected a list"),
        ("length", "expected a list"),
        (["length"], "part 1: found 'length'; expected a mapping"),
        ([{"weight": 1}], "part 1.*the key 'ranker'"),
        ([{"ranker": "length", "wieght": 1}], "unknown key 'wieght'; did you mean 'weight'"),
        ([{"ranker": "length", "weight": "1"}], "weight is '1'"),
        ([{"ranker": "length", "weight": float("nan")}], "weight is nan"),
        ([{"ranker": "length", "normalise": "zscor"}], "'zscor'; did you mean 'zscore'"),
        ([{"ranker": "length"}, {"ranker": "lenght"}], "part 2: unknown ranker 'lenght'"),
        ([{"ranker": "human"}], "part 1: ranker 'human' cannot be part"),
        ([{"ranker": "regex"}], "part 1: ranker 'regex': the setting 'pattern' is missing"),
    ],
)
def test_bad_parts(parts, what):
    with pytest.raises(Exception, match=what):
        build_ranker("mixture", parts=parts)
