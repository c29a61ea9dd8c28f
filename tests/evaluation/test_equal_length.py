"""The rate at equal length: the fit against another optimiser, its interval by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from selm_jax.evaluation.equal_length import RIDGE, Comparisons, estimate, fit
from selm_jax.statistics import proportions


def compared(y, lengths, prompt=None):
    return Comparisons.of(y, lengths, np.arange(len(y)) if prompt is None else prompt)


def test_the_fit_is_the_minimum_and_odd():
    rng = np.random.default_rng(1)
    lengths = rng.integers(10, 400, (200, 2)).astype(float)
    delta = lengths[:, 0] - lengths[:, 1]
    x = np.tanh(delta / delta.std(ddof=1))
    truth = 1 / (1 + np.exp(-(0.4 + 1.5 * x)))
    y = np.clip(truth + rng.normal(0, 0.1, 200), 0, 1)
    for prompt in (np.arange(200), np.arange(200) // 4, rng.integers(0, 40, 200)):
        prompt = np.unique(prompt, return_inverse=True)[1]
        weight = 1 / np.array([(prompt == p).sum() for p in prompt])

        def loss(b, weight=weight):
            z = b[0] + b[1] * x
            return np.sum(weight * (np.logaddexp(0, z) - y * z)) + 0.5 * np.dot(RIDGE, b**2)

        found = fit(compared(y, lengths, prompt))
        np.testing.assert_allclose(found, minimize(loss, np.zeros(2), tol=1e-12).x, atol=1e-4)
        back = fit(compared(1 - y, lengths[:, ::-1], prompt))
        np.testing.assert_allclose(back, (-found[0], found[1]), atol=1e-8)
        one, other = (
            estimate(compared(*each, prompt)) for each in ((y, lengths), (1 - y, lengths[:, ::-1]))
        )
        assert [one.low, one.high] == pytest.approx([1 - other.high, 1 - other.low], abs=1e-9)


@pytest.mark.parametrize("wins", [0, 7, 17, 20])
def test_without_differences_in_length_it_is_wilsons_interval(wins):
    y = np.repeat([1.0, 0.0], [wins, 20 - wins])
    found = estimate(compared(y, np.full((20, 2), 100.0)))
    low, high = proportions.interval(y)
    # The dispersion is about the fit, whose penalty moves it a little off the mean.
    assert [found.low, found.high] == pytest.approx([low, high], abs=0.01)
    assert found.low <= found.mean <= found.high


@pytest.mark.parametrize("n", [20, 100])
@pytest.mark.parametrize("rate", [0.5, 0.8, 0.95])
def test_it_holds_the_rate_at_equal_length(rate, n):
    """A's answers are longer, and length wins: the raw rate is far above that at equal length."""
    rng, theta, held = np.random.default_rng(0), np.log(rate / (1 - rate)), 0
    for _ in range(150):
        lengths = np.stack([rng.normal(600, 150, n), rng.normal(500, 150, n)], 1)
        delta = lengths[:, 0] - lengths[:, 1]
        p = 1 / (1 + np.exp(-(theta + np.tanh(delta / delta.std(ddof=1)))))
        found = estimate(compared((rng.random(n) < p).astype(float), lengths))
        held += found.low <= rate <= found.high
    assert held / 150 >= 0.89  # a share of 150 varies by 0.02


def test_samples_of_a_prompt_are_one_cluster():
    rng = np.random.default_rng(3)
    y, lengths = rng.integers(0, 2, 40).astype(float), rng.normal(400, 90, (40, 2))
    once = estimate(compared(y, lengths))
    often = estimate(
        compared(np.repeat(y, 4), np.repeat(lengths, 4, 0), np.repeat(np.arange(40), 4))
    )
    assert [once.low, once.high] == pytest.approx([often.low, often.high], abs=0.005)
