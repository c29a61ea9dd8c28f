"""Intervals against what is known of the numbers that they were drawn from."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from selm_jax.statistics.intervals import difference, pooled


def test_one_seed_is_the_plain_bootstrap():
    x = np.random.default_rng(0).gamma(2, size=60)
    got = pooled(x[None])
    want = stats.bootstrap((x,), np.mean, method="percentile", rng=np.random.default_rng(1))
    assert got.mean == pytest.approx(x.mean())
    assert got.stderr == pytest.approx(want.standard_error, rel=0.05)
    assert [got.low, got.high] == pytest.approx(list(want.confidence_interval), abs=0.02)


def test_several_seeds_bring_their_own_spread_along():
    """Seeds that differ and prompts that do not: the error is that of a mean over seeds."""
    effect = np.random.default_rng(0).normal(size=8)
    got = pooled(np.repeat(effect[:, None], 50, axis=1))
    assert got.stderr == pytest.approx(stats.sem(effect), rel=0.05)


def test_equal_seeds_are_no_new_prompts():
    """Ten copies of one seed must not shrink the interval: prompts are clusters."""
    x = np.random.default_rng(0).normal(size=(1, 40))
    assert pooled(np.repeat(x, 10, axis=0)).stderr == pytest.approx(pooled(x).stderr, rel=0.05)


@pytest.mark.parametrize(("seeds", "least"), [(1, 0.91), (2, 0.80), (3, 0.91), (12, 0.91)])
def test_it_covers_the_truth_about_as_often_as_it_says(seeds, least):
    rng = np.random.default_rng(0)
    of_seed = 0.5 if seeds > 1 else 0.0  # of one seed nothing is said about others
    hits = 0
    for i in range(300):
        table = rng.normal(size=(1, 60)) + of_seed * rng.normal(size=(seeds, 1))
        found = pooled(table + rng.normal(size=(seeds, 60)), seed=i)
        hits += found.low <= 0 <= found.high
    assert least <= hits / 300


@pytest.mark.parametrize(("seeds", "others"), [(3, 3), (3, 1), (3, 2), (2, 5)])
def test_a_difference_covers_the_truth_however_many_seeds_each_has(seeds, others):
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        prompts = rng.normal(size=(1, 40))
        a, b = (
            prompts + (0.5 if n > 1 else 0) * rng.normal(size=(n, 1)) + rng.normal(size=(n, 40))
            for n in (seeds, others)
        )
        found = difference(a, b)
        hits += found.low <= 0 <= found.high
        assert found.mean == pytest.approx(a.mean() - b.mean())
    assert 0.91 <= hits / 300


def test_one_prompt_or_equal_values_have_no_interval_and_say_so():
    got = pooled(np.array([[0.3]]))
    assert (got.mean, got.stderr, got.low, got.high) == (0.3, None, None, None)
    assert str(got) == "0.300 (no interval: one prompt)"
    for values in (np.full((1, 9), 2.0), np.full((3, 9), 2.0)):
        got = pooled(values)
        assert (got.stderr, got.low, got.high) == (0, None, None)
        assert str(got) == "2.000 (no interval: all values are equal)"


def test_all_won_is_no_certainty_with_seeds_and_in_differences():
    won, lost = np.ones((1, 20)), np.zeros((1, 20))
    assert str(pooled(won, share=True)) == "1.000 [0.839, 1.000]"  # Wilson's
    assert pooled(np.ones((3, 20)), share=True).low == pytest.approx(0.839, abs=1e-3)
    got = difference(won, lost, share=True)
    assert got.mean == 1 == got.high and 0.6 < got.low < 0.7
    for one, other in ((won, won), (np.ones((3, 20)), np.ones((2, 20)))):
        got = difference(one, other, share=True)
        assert got.mean == 0 and got.low == pytest.approx(-got.high) and 0.1 < got.high < 0.2


@pytest.mark.parametrize("p", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_a_share_over_three_seeds_holds_the_truth(p, spread):
    """Seeds and prompts move the log-odds; with `spread` 0, values are independent."""
    rng, logit = np.random.default_rng(0), np.log(p / (1 - p))
    truth, held = (1 / (1 + np.exp(-logit - spread * rng.normal(size=200_000)))).mean(), 0
    for _ in range(200):
        of_seed, of_prompt = rng.normal(size=(3, 1)), rng.normal(size=(1, 20))
        moved = logit + spread * (0.6 * of_seed + 0.8 * of_prompt)
        won = rng.random((3, 20)) < 1 / (1 + np.exp(-moved))
        found = pooled(won.astype(float), share=True)
        assert 0 <= found.low <= found.mean <= found.high <= 1
        held += found.low <= truth <= found.high
    assert held / 200 >= 0.9
