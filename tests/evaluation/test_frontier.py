"""The metrics of an iteration: which rewards are shares, and what has no interval."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from selm_jax.evaluation import frontier
from selm_jax.tables import heldout


def answers(scores):
    return [
        heldout.Row(f"p{i}", "?", "greedy", 0, f"word {i}", (1, 2), "stop", score, -1.0, -1.0)
        for i, score in enumerate(scores)
    ]


def ends(found, name):
    return found[f"heldout/{name}_low"], found[f"heldout/{name}_high"]


def test_answers_that_are_right_or_wrong_are_a_share():
    """As a rule that verifies scores them: all right is no certainty, nor is a gain from none."""
    found = frontier.summarize(answers([1.0] * 20), answers([0.0] * 20))
    wilson = stats.binomtest(20, 20).proportion_ci(method="wilson")
    assert ends(found, "reward_greedy") == pytest.approx((wilson.low, wilson.high))
    low, high = ends(found, "gain")
    assert found["heldout/gain"] == 1 == high and 0.6 < low < 0.7
    halves = frontier.summarize(answers([1.0, 0.5] * 10), None)
    assert ends(halves, "reward_greedy")[1] < 0.95


def test_a_reward_of_any_other_kind_has_an_interval_only_where_it_varies():
    scores = np.random.default_rng(0).normal(0.5, 0.1, 20)
    low, high = ends(frontier.summarize(answers(scores), None), "reward_greedy")
    assert high - low == pytest.approx(2 * 1.96 * stats.sem(scores), rel=0.15)
    for same in ([0.7] * 20, [0.7]):
        found = frontier.summarize(answers(same), None)
        assert found["heldout/reward_greedy"] == pytest.approx(0.7)
        assert "heldout/reward_greedy_low" not in found


@pytest.mark.parametrize(("greedy", "sample"), [(0.5, 0.7), (0.7, 0.5), (0.7, 0.7), (1.0, 0.0)])
def test_each_kind_of_answers_is_a_share_by_its_own_scores(greedy, sample):
    rows = answers([greedy]) + [
        dataclasses.replace(each, kind="sample", sample=1) for each in answers([sample])
    ]
    shares = frontier.shares([rows])
    assert ("reward_greedy" in shares, "reward_sample" in shares) == (greedy != 0.7, sample != 0.7)
