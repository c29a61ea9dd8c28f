"""What is measured of every objective, whatever its loss is and whatever metrics it reports.

logps/ROLE        log pi(response)
log_ratios/ROLE   r(role) = log pi(response) - log pi_ref(response)
rewards/ROLE      beta * r(role), the implicit reward; of a reward model its reward
rewards/margins   rewards/chosen - rewards/rejected
rewards/accuracies   1 where the chosen response has the higher reward, 0 where it has not
"""

from selm_jax.objectives.losses import Logps, Metrics, Objective, Rewards
from selm_jax.objectives.roles import CHOSEN, PAIR, REJECTED


def measures(batch: Logps | Rewards, objective: Objective) -> Metrics:
    """Metrics per example, in nats, of the roles that the objective needs.

    An objective without a reference has no log-ratios and no implicit rewards. Two equal rewards
    count as the wrong order for a language model, and as half right for a reward model, whose fresh
    head gives nothing else.
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
