"""The loss of reward models, against TRL's formula written out."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selm_jax.objectives.build import build_objective
from selm_jax.objectives.losses import ObjectiveError, Rewards

seeds = st.integers(0, 2**32 - 1)


def some(seed: int, examples: int = 6) -> Rewards:
    rng = np.random.default_rng(seed)

    def per_role(scale):
        roles = ("chosen", "rejected", "explore")
        return {role: jnp.asarray(rng.normal(0, scale, examples), jnp.float32) for role in roles}

    return Rewards(per_role(3), per_role(2))


def trl(chosen, rejected, margin=None, center_rewards_coefficient=None) -> float:
    """TRL 1.x's RewardTrainer.compute_loss, in float64: the mean loss plus the mean centering."""
    chosen, rejected = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    gap = chosen - rejected - (0 if margin is None else np.asarray(margin, np.float64))
    loss = np.mean(np.log1p(np.exp(-gap)))
    if center_rewards_coefficient is not None:
        loss += center_rewards_coefficient * np.mean((chosen + rejected) ** 2)
    return float(loss)


@settings(max_examples=50, deadline=None)
@given(seed=seeds, margin=st.none() | st.floats(0, 3), centering=st.none() | st.floats(0, 1))
def test_the_mean_is_trls(seed, margin, centering):
    rewards = some(seed)
    chosen, rejected = rewards.model["chosen"], rewards.model["rejected"]
    asked = None
    if margin is not None:  # TRL's column `margin` contains the difference of the scores
        asked = margin * (rewards.scores["chosen"] - rewards.scores["rejected"])
    losses, metrics = build_objective(
        "bradley_terry", margin=margin or 0.0, centering=centering or 0.0
    )(rewards)
    expected = trl(chosen, rejected, asked, centering)
    np.testing.assert_allclose(losses.mean(), expected, rtol=2e-5, atol=1e-6)
    assert metrics["rewards/accuracies"].tolist() == (chosen > rejected).tolist()
    np.testing.assert_array_equal(metrics["rewards/margins"], chosen - rejected)
    np.testing.assert_array_equal(metrics["loss/bradley_terry"], losses)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, e=st.floats(0, 0.49))
def test_smoothing_expects_labels_that_are_wrong_that_often(seed, e):
    rewards = some(seed)
    swapped = rewards.replace(
        model=rewards.model
        | {"chosen": rewards.model["rejected"], "rejected": rewards.model["chosen"]}
    )
    plain = build_objective("bradley_terry")
    expected = (1 - e) * plain(rewards)[0] + e * plain(swapped)[0]
    smoothed = build_objective("bradley_terry", label_smoothing=e)(rewards)[0]
    np.testing.assert_allclose(smoothed, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences_and_passes_by_the_scores():
    rewards = some(3)
    objective = build_objective("bradley_terry", margin=0.5, label_smoothing=0.1, centering=0.05)
    gradient = jax.grad(lambda r: objective(r)[0].sum())(rewards)
    for scores in gradient.scores.values():
        np.testing.assert_array_equal(scores, 0)
    np.testing.assert_array_equal(gradient.model["explore"], 0)
    for role in ("chosen", "rejected"):
        step = 1e-2
        up, down = (
            objective(rewards.replace(model=rewards.model | {role: rewards.model[role] + s}))[0]
            for s in (step, -step)
        )
        np.testing.assert_allclose(gradient.model[role], (up - down) / (2 * step), atol=1e-3)


def test_equal_rewards_cost_log_2_and_are_half_right():
    zeros = dict.fromkeys(("chosen", "rejected"), jnp.zeros(3))
    losses, metrics = build_objective("bradley_terry")(Rewards(zeros, zeros))
    np.testing.assert_allclose(losses, math.log(2), rtol=1e-6)
    assert metrics["rewards/accuracies"].tolist() == [0.5] * 3


@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_huge_gaps_stay_finite(gap):
    model = {"chosen": jnp.full(2, gap), "rejected": jnp.zeros(2)}
    objective = build_objective("bradley_terry", centering=0.01)
    rewards = Rewards(model, jax.tree.map(jnp.zeros_like, model))
    for leaf in jax.tree.leaves(
        (objective(rewards), jax.grad(lambda r: objective(r)[0].sum())(rewards))
    ):
        assert np.all(np.isfinite(leaf))


def test_what_reads_rewards_and_what_reads_log_probabilities_cannot_be_summed():
    with pytest.raises(
        ObjectiveError, match=r"bradley_terry\+dpo cannot be summed: .*reward model"
    ):
        build_objective("bradley_terry+dpo", beta=0.1)
    assert (
        build_objective("bradley_terry").rates and build_objective("bradley_terry").reference_free
    )
    assert not build_objective("selm", beta=0.1, alpha=0.1).rates


@pytest.mark.parametrize(
    ("mine", "message"),
    [
        ({"margin": -1.0}, "margin is -1.0; expected a number of at least 0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"centering": float("nan")}, "centering is nan"),
        ({"beta": 0.1}, "no setting 'beta'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(mine, message):
    with pytest.raises(ObjectiveError, match=message):
        build_objective("bradley_terry", **mine)
