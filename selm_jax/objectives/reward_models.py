"""The loss that trains a reward model, as a pure function of rewards."""

import jax
import jax.numpy as jnp

from selm_jax.objectives.objective import (
    Metrics,
    Objective,
    PerExample,
    Rewards,
    check,
    flipped,
    reward_metrics,
)
from selm_jax.objectives.roles import CHOSEN, PAIR, REJECTED


def bradley_terry(
    margin: float = 0.0, label_smoothing: float = 0.0, centering: float = 0.0
) -> Objective:
    """A reward model's Bradley-Terry loss of a pair, with label smoothing and centering.

        loss = -(1-e) log sigmoid(d) - e log sigmoid(-d) + centering * (r(y_w) + r(y_l))^2
        d    = r(y_w) - r(y_l) - margin * (score(y_w) - score(y_l)),   with e = label_smoothing

    r is the model's reward; arXiv 2203.02155 equation 1. With `margin`, rewards should differ by at
    least margin times the difference of the data's scores (arXiv 2307.09288 equation 2, where the
    data contains the difference itself; TRL's column `margin`). `centering` pulls the mean reward
    towards 0; the first two terms do not determine it (arXiv 2312.09244 equation 2; TRL's
    `center_rewards_coefficient`, 0.01 there).
    """
    check(margin=margin, label_smoothing=label_smoothing, centering=centering)
    e = label_smoothing

    def function(rewards: Rewards) -> tuple[PerExample, Metrics]:
        chosen, rejected = (rewards.model[role] for role in PAIR)
        asked = margin * (rewards.scores[CHOSEN] - rewards.scores[REJECTED])
        losses = flipped(chosen - rejected - jax.lax.stop_gradient(asked), 1 - e, e)
        losses += centering * jnp.square(chosen + rejected)
        # Equal rewards count as half right: a newly initialised head gives only equal rewards.
        right = (1 + jnp.sign(chosen - rejected)) / 2
        return losses, {"loss/bradley_terry": losses} | reward_metrics(chosen, rejected, right)

    return Objective(
        PAIR, function, ("bradley_terry",), "reward",
        reference_free=True, rates=True,
    )  # fmt: skip
