"""SELM's objective: DPO plus optimism, as pure functions of log-probabilities.

SELM (arXiv 2405.19332, equation 4.2) minimises

    loss = -log sigmoid(beta * h)  +  alpha * beta * r(explore)               selm = dpo + optimism

so that descent LOWERS the likelihood of what the reference would say anyway: that is the optimism.
Here r(role) = log pi(response) - log pi_ref(response) is the log-ratio, and h = r(chosen) -
r(rejected) the margin (see `objective`).
"""

from jax.nn import log_sigmoid

from selm_jax.objectives.divergences import divergence_score
from selm_jax.objectives.objective import (
    CHOICES,
    Objective,
    check,
    compose,
    explore_loss,
    margin_loss,
)
from selm_jax.objectives.roles import EXPLORE

CONVENTIONS = CHOICES["convention"]


def dpo(beta: float, f_divergence: str = "reverse_kl", f_alpha: float = 0.5) -> Objective:
    """DPO: -log sigmoid(beta h), h the log-ratio margin. arXiv 2305.18290 eq. 7; TRL "sigmoid".

    `f_divergence` names another divergence than the reverse KL; see `divergences`.
    """
    check(beta=beta)
    score = divergence_score(f_divergence, f_alpha)
    return margin_loss("dpo", beta, lambda h: -log_sigmoid(beta * h), score)


def optimism(weight: float, beta: float = 1.0) -> Objective:
    """SELM's exploration term: weight * r(explore), where r is a log-ratio.

    The paper (arXiv 2405.19332 equation 4.2) drops the constant -weight * log pi_ref(y_ref). The
    authors' code keeps it, and so does this function: the gradient is the same, and the term is 0
    while the policy equals the reference. `beta` only scales the metric `optimism/reward`.
    """
    check(weight=weight, beta=beta)
    return explore_loss("optimism", beta, lambda logps: weight * logps.log_ratio(EXPLORE))


def weighted_optimism(beta: float, alpha: float, convention: str = "alpha_beta") -> Objective:
    """`optimism` with a weight computed from alpha in one of the SELM paper's two conventions.

    "alpha_beta": the weight is alpha * beta, as in equations 4.2 and 4.3 and in the authors' code
    (their published alphas are in this convention);
    "alpha": the weight is alpha, as in Algorithms 1 and 2, the regret proof, and XPO.
    """
    check(beta=beta, alpha=alpha, convention=convention)
    return optimism(alpha * beta if convention == "alpha_beta" else alpha, beta)


def selm(beta: float, alpha: float, convention: str = "alpha_beta") -> Objective:
    """SELM: dpo + optimism. arXiv 2405.19332; `weighted_optimism` explains `convention`.

    Where the policy is the reference, the loss is log 2, whatever alpha is:

    >>> import jax.numpy as jnp
    >>> from selm_jax.objectives.objective import Logps
    >>> from selm_jax.objectives.roles import ROLES
    >>> same = {role: jnp.array([-10.0]) for role in ROLES}
    >>> one = {role: jnp.ones(1) for role in ROLES}
    >>> losses, metrics = selm(beta=0.1, alpha=0.01)(Logps(same, same, one, one))
    >>> round(float(losses[0]), 4), float(metrics["optimism/reward"][0])
    (0.6931, 0.0)
    """
    return compose(dpo(beta), weighted_optimism(beta, alpha, convention))
