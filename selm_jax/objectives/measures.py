"""Metrics that are computed for every objective, in addition to those that its loss reports.

logps/ROLE        log pi(response)
log_ratios/ROLE   r(role) = log pi(response) - log pi_ref(response)
rewards/ROLE      beta * r(role), the implicit reward; for a reward model, its reward
rewards/margins   rewards/chosen - rewards/rejected
rewards/accuracies   1 if the chosen response has the higher reward, else 0
"""

from selm_jax.objectives.losses import Logps, Metrics, Objective, Rewards
from selm_jax.objectives.roles import CHOSEN, PAIR, REJECTED


def measures(batch: Logps | Rewards, objective: Objective) -> Metrics:
    """Metrics of each example for the roles that the objective needs; log-probabilities in nats.

    An objective without a reference has no log-ratios and no implicit rewards. Equal rewards count
    as wrong (0) for a language model. For a reward model they count as half right (0.5), because
    a newly initialized head gives all responses the same reward.
    """
    roles = objective.roles
    if isinstance(batch, Rewards):
        return _rewards({role: batch.model[role] for role in roles}, equal=0.5)
    found = {f"logps/{role}": batch.policy[role] for role in roles}
    if objective.reference_free:
        return found
    ratios = {role: batch.log_ratio(role) for role in roles}
    found |= {f"log_ratios/{role}": ratio for role, ratio in ratios.items()}
    rewards = {role: objective.beta * ratio for role, ratio in ratios.items()}
    return found | _rewards(rewards, equal=0.0)


def _rewards(rewards: Metrics, equal: float) -> Metrics:
    found = {f"rewards/{role}": reward for role, reward in rewards.items()}
    if set(PAIR) <= set(rewards):
        margin = rewards[CHOSEN] - rewards[REJECTED]
        right = (margin > 0) + equal * (margin == 0)
        found |= {"rewards/margins": margin, "rewards/accuracies": right.astype(margin.dtype)}
    return found
