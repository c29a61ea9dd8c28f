"""The losses that training minimises, by kind; all are pure functions.

    selm            SELM = DPO + optimism: the method of this project, on one page
    pairs           the other losses of a preference pair, and SFT
    exploration     the terms that other papers add in order to explore
    general         losses of general preferences, for self-play
    reward_models   the loss of a reward model
    objective       what an objective is, and sums of objectives

A YAML file names an objective, a sum of several, or your own function: see `build`.

>>> dpo(beta=0.1).roles
('chosen', 'rejected')
"""

from selm_jax.objectives.exploration import copo, geb, se_popo, vpo, xpo
from selm_jax.objectives.general import inpo, ipo_online, nash, sppo, sppo_hard
from selm_jax.objectives.objective import (
    CHOICES,
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
    scaled,
)
from selm_jax.objectives.pairs import (
    apo_down,
    apo_zero,
    bco_pair,
    cdpo,
    discopop,
    exo_pair,
    hinge,
    ipo,
    ld_dpo,
    nca_pair,
    robust,
    sft,
    sigmoid_norm,
    simpo,
    wpo,
)
from selm_jax.objectives.reward_models import bradley_terry
from selm_jax.objectives.roles import ROLES
from selm_jax.objectives.selm import CONVENTIONS, dpo, optimism, selm, weighted_optimism
