"""Holm's correction, computed by hand and checked for its error rate."""

import numpy as np

from selm_jax.statistics.multiple import holm


def test_by_hand():
    p = np.array([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(holm(p), [0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([])).size == 0


def test_even_one_false_claim_in_a_family_is_rare():
    p = np.random.default_rng(2).uniform(size=(4000, 50))
    assert np.mean([np.any(holm(row) < 0.05) for row in p]) < 0.065
