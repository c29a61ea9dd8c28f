import jax
import numpy as np

from selm_jax.lab import exact, theory
from selm_jax.lab.worlds import WorldShape, make_world


def test_constants_are_those_of_the_theorem():
    r, d, rounds, log_size = 0.7, 5, 100, 12.0
    c = theory.constants(r, d, rounds, log_size)
    eta = np.sqrt(rounds * d / (np.exp(4 * r) * log_size))
    np.testing.assert_allclose(c.eta, eta, rtol=1e-5)
    np.testing.assert_allclose(c.alpha, 2 / (eta * np.exp(4 * r)), rtol=1e-5)
    np.testing.assert_allclose(
        c.bound, np.sqrt(d) * np.exp(2 * r) * np.sqrt(rounds * log_size), rtol=1e-5
    )


def test_a_large_r_max_neither_overflows_nor_underflows():
    c = theory.constants(40.0, 5, 100, 12.0)
    assert 0 < c.alpha < 1e-30 and 1e30 < c.bound < np.inf


def test_r_max_is_the_smallest_that_holds_the_optimum():
    w = make_world(jax.random.key(0), WorldShape())
    ratio = np.abs(exact.optimum(w) - w.log_reference)
    c = theory.of_world(w, 10)
    assert np.isclose(c.r_max, ratio.max()) and c.log_size > 0
