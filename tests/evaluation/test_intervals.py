"""Intervals against what is known of the numbers that they were drawn from."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from selm_jax.evaluation.intervals import pooled


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


def test_it_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        prompts, seeds = rng.normal(size=(1, 60)), 0.3 * rng.normal(size=(12, 1))
        found = pooled(prompts + seeds + rng.normal(size=(12, 60)), seed=i)
        hits += found.low <= 0 <= found.high
    assert 0.90 <= hits / 200 <= 0.99


def test_one_prompt_has_no_interval():
    got = pooled(np.array([[0.3]]))
    assert got.mean == got.low == got.high and np.isnan(got.stderr)
