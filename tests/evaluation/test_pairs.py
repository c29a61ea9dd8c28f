"""The accuracy of a reward model and its interval."""

import numpy as np
import pytest
from scipy import stats

from selm_jax.evaluation import pairs
from selm_jax.tables.pairs import Row


def test_counts_are_those_of_the_table():
    rewards = [(1.0, 0.0), (0.5, 0.5), (-1.0, 2.0), (3.0, -3.0)]
    found = pairs.summarize([Row(str(i), "p", "a", "b", *both) for i, both in enumerate(rewards)])
    assert found["heldout/accuracy"] == 2.5 / 4 and found["heldout/ties"] == 1
    assert found["heldout/margin"] == pytest.approx(np.mean([1, 0, -3, 6]))
    expected = np.mean([np.log1p(np.exp(-gap)) for gap in (1, 0, -3, 6)])
    assert found["heldout/loss"] == pytest.approx(expected)


def test_all_pairs_right_is_no_certainty():
    found = pairs.summarize([Row(str(i), "p", "a", "b", 1.0, 0.0) for i in range(20)])
    theirs = stats.binomtest(20, 20).proportion_ci(method="wilson")
    ends = (found["heldout/accuracy_low"], found["heldout/accuracy_high"])
    np.testing.assert_allclose(ends, theirs, atol=1e-12)
