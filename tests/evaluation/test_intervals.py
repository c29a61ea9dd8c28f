"""Intervals against what is known of the numbers that they were drawn from."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from selm_jax.evaluation.intervals import difference, pooled


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


def test_one_prompt_has_no_interval():
    got = pooled(np.array([[0.3]]))
    assert got.mean == got.low == got.high and np.isnan(got.stderr)
