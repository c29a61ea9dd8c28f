import numpy as np
import pytest
import scipy.stats

from selm_jax.lab import stats


def test_p_is_scipys_t_test_and_nothing_is_nothing():
    values = np.random.default_rng(0).normal(0.3, 1, (5, 40))
    np.testing.assert_allclose(
        stats.p_zero_mean(values), scipy.stats.ttest_1samp(values, 0, axis=1).pvalue
    )
    np.testing.assert_array_equal(stats.p_zero_mean(np.zeros((2, 8))), 1)
    assert stats.p_zero_mean(np.ones(8)) == 0


def test_interval_covers_the_mean_as_often_as_it_says():
    values = np.random.default_rng(1).exponential(1, (4000, 128))
    _, low, high = stats.mean_interval(values)
    assert 0.93 < np.mean((low < 1) & (high > 1)) < 0.96


def test_holm_by_hand_and_by_its_promise():
    np.testing.assert_allclose(
        stats.holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02]
    )
    p = np.random.default_rng(2).uniform(size=(4000, 50))
    false = np.mean([np.any(stats.holm(row) < 0.05) for row in p])
    assert false < 0.065


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_slope_of_a_power_law(power):
    t = np.arange(1, 201)
    noise = np.random.default_rng(3).gamma(4, 0.25, (64, 200))
    regret = noise * np.diff(t**power, prepend=0)
    slope, low, high = stats.loglog_slope(regret)
    assert low < power < high and abs(slope - power) < 0.05 and high - low < 0.2
