"""The accuracy of a reward model and its interval."""

import numpy as np
import pytest
from scipy import stats

from selm_jax.evaluation import pairs


@pytest.mark.parametrize(("right", "count"), [(0, 7), (3, 7), (7, 7), (180, 200)])
def test_the_interval_is_wilsons(right, count):
    theirs = stats.binomtest(right, count).proportion_ci(method="wilson")
    np.testing.assert_allclose(pairs.wilson(right, count), theirs, atol=1e-12)


def test_counts_are_those_of_the_table():
    rewards = [(1.0, 0.0), (0.5, 0.5), (-1.0, 2.0), (3.0, -3.0)]
    table = pairs.table(
        [
            {"prompt_id": str(i), "prompt": "p", "chosen": "a", "rejected": "b",
             "reward_chosen": a, "reward_rejected": b}
            for i, (a, b) in enumerate(rewards)
        ]
    )  # fmt: skip
    found = pairs.summarize(table)
    assert found["heldout/accuracy"] == 2.5 / 4 and found["heldout/ties"] == 1
    assert found["heldout/margin"] == pytest.approx(np.mean([1, 0, -3, 6]))
    expected = np.mean([np.log1p(np.exp(-gap)) for gap in (1, 0, -3, 6)])
    assert found["heldout/loss"] == pytest.approx(expected)
