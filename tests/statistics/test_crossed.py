"""The standard error over seeds and prompts is that of the analysis of variance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from selm_jax.statistics.crossed import difference, mean


def test_mean_squares_are_those_of_the_slow_obvious_analysis_of_variance():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 7)) + 2 * rng.normal(size=(4, 1)) + 2 * rng.normal(size=(1, 7))
    s, n = values.shape
    grand = sum(values[i, j] for i in range(s) for j in range(n)) / (s * n)
    rows = [sum(values[i, j] for j in range(n)) / n for i in range(s)]
    columns = [sum(values[i, j] for i in range(s)) / s for j in range(n)]
    ms = (
        n * sum((r - grand) ** 2 for r in rows) / (s - 1),
        s * sum((c - grand) ** 2 for c in columns) / (n - 1),
        sum((values[i, j] - rows[i] - columns[j] + grand) ** 2 for i in range(s) for j in range(n))
        / ((s - 1) * (n - 1)),
    )
    total = ms[0] + ms[1] - ms[2]
    freedom = total**2 / (
        ms[0] ** 2 / (s - 1) + ms[1] ** 2 / (n - 1) + ms[2] ** 2 / ((s - 1) * (n - 1))
    )
    np.testing.assert_allclose(mean(values), (grand, (total / (s * n)) ** 0.5, freedom), rtol=1e-12)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1)])
def test_one_seed_or_one_prompt_leaves_students_t(shape):
    values = np.random.default_rng(2).normal(size=shape)
    found = mean(values)
    assert found.stderr == pytest.approx(stats.sem(values.ravel())) and found.freedom == 8


@given(st.integers(2, 4), st.integers(2, 5), st.integers(0, 99))
def test_what_varies_has_an_error_whatever_cancels(seeds, prompts, seed):
    """Also if all seeds and all prompts have the same mean: the error of two opposite seeds on
    two prompts used to be 0."""
    values = np.random.default_rng(seed).normal(size=(seeds, prompts))
    values -= values.mean(0)
    values -= values.mean(1, keepdims=True)
    assert mean(values).stderr > 0
    assert mean(np.array([[1.0, -1.0], [-1.0, 1.0]])).stderr > 0


def test_seeds_that_cannot_be_paired_bring_their_own_error_each():
    rng = np.random.default_rng(3)
    one, other = rng.normal(size=(3, 1)) + np.zeros((1, 8)), np.zeros((1, 8))
    found = difference(one, other)
    assert found.stderr == pytest.approx(stats.sem(one[:, 0])) and found.freedom == pytest.approx(2)


def test_values_that_are_no_table_of_numbers_are_refused():
    assert mean(np.full((3, 4), 2.0))[:2] == (2, 0)
    for bad in (np.zeros((1, 1)), np.zeros((0, 3)), np.array([[1.0, np.nan]])):
        with pytest.raises(ValueError, match="at least 2 values, all finite"):
            mean(bad)
