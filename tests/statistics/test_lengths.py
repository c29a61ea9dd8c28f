"""The slope of a score over length: by prompt dummies and a sandwich of full matrices."""

import numpy as np
import pytest

from selm_jax.statistics.lengths import UNIT, described, slope, slope_metrics


def by_dummies(prompts, lengths, scores):
    """The first coefficient of a regression with one intercept for each prompt, and its error."""
    names = sorted(set(prompts))
    intercepts = [[p == name for name in names] for p in prompts]
    design = np.column_stack([lengths, np.array(intercepts, float)])
    bread = np.linalg.inv(design.T @ design)
    found = bread @ design.T @ scores
    rest = scores - design @ found
    meat = np.zeros_like(bread)
    for name in names:
        mine = np.array([p == name for p in prompts])
        score = design[mine].T @ rest[mine]
        meat += np.outer(score, score)
    n = len(names)
    return found[0], np.sqrt(n / (n - 1) * (bread @ meat @ bread)[0, 0])


def test_the_slope_is_that_of_a_regression_with_an_intercept_for_each_prompt():
    rng = np.random.default_rng(0)
    prompts = [f"p{i // 3}" for i in range(60)]
    lengths = rng.integers(5, 300, 60).tolist()
    hard = np.repeat(rng.normal(0, 10, 20), 3)
    scores = hard + 0.02 * np.array(lengths) + rng.normal(0, 1, 60)
    wanted = UNIT * np.array(by_dummies(prompts, lengths, scores))
    np.testing.assert_allclose(slope(prompts, lengths, scores), wanted, rtol=1e-9)
    # An answer without a score, and a prompt with one answer, change nothing.
    more = [*prompts, "p0", "alone"], [*lengths, 9000, 7], [*scores, np.nan, 1e6]
    np.testing.assert_allclose(slope(*more), wanted, rtol=1e-9)


@pytest.mark.parametrize(
    "answers",
    [
        ([], [], []),
        (["a", "a"], [7, 7], [0.0, 1.0]),
        (["a", "b"], [7, 9], [0.0, 1.0]),
        (["a", "a"], [7, 9], [0.0, np.nan]),
    ],
    ids=["no answers", "equal lengths", "one answer each", "one score"],
)
def test_without_two_lengths_there_is_no_slope(answers):
    assert slope_metrics("length/slope", *answers) == {}


def test_quantiles():
    found = described("length/chosen", range(1, 12))
    assert found == {f"length/chosen{k}": v for k, v in
                     {"": 6.0, "_p10": 2.0, "_p50": 6.0, "_p90": 10.0}.items()}  # fmt: skip
    assert described("length/chosen", []) == {}
