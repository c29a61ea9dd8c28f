"""The losses that training minimises, by kind; all are pure functions.

    selm            SELM = DPO + optimism: the method of this project, on one page
    pairs           the other losses of a preference pair, and SFT
    exploration     the terms that other papers add in order to explore
    reward_models   the loss of a reward model
    objective       what an objective is, and sums of objectives

A YAML file names an objective, a sum of several, or your own function: see `build`.

>>> dpo(beta=0.1).roles
('chosen', 'rejected')
"""

from selm_jax.objectives.exploration import xpo
from selm_jax.objectives.objective import (
    RANGES,
    Logps,
    LossFunction,
    Metrics,
    Objective,
    ObjectiveError,
    PerExample,
    Rewards,
    Score,
    compose,
)
from selm_jax.objectives.pairs import cdpo, hinge, ipo, robust, sft, simpo
from selm_jax.objectives.reward_models import bradley_terry
from selm_jax.objectives.roles import ROLES
from selm_jax.objectives.selm import CONVENTIONS, dpo, optimism, selm, weighted_optimism

__all__ = [
    "CONVENTIONS",
    "RANGES",
    "ROLES",
    "Logps",
    "LossFunction",
    "Metrics",
    "Objective",
    "ObjectiveError",
    "PerExample",
    "Rewards",
    "Score",
    "bradley_terry",
    "cdpo",
    "compose",
    "dpo",
    "hinge",
    "ipo",
    "optimism",
    "robust",
    "selm",
    "sft",
    "simpo",
    "weighted_optimism",
    "xpo",
]
