"""Exploration terms: what other papers than SELM's add to a preference loss."""

from selm_jax.objectives.objective import Objective, check, compose, explore_loss
from selm_jax.objectives.roles import EXPLORE
from selm_jax.objectives.selm import dpo


def xpo(beta: float, alpha: float) -> Objective:
    """XPO: dpo + alpha * log pi(y_ref). arXiv 2405.21046; like TRL, without -log pi_ref(y_ref)."""
    check(alpha=alpha)
    term = explore_loss("xpo", beta, lambda logps: alpha * logps.policy[EXPLORE])
    return compose(dpo(beta), term)
