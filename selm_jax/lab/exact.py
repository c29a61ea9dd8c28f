"""Computes a world's exact means, KL, optimum and regret, as sums over all responses.

Policies are tables of log-probabilities. nu is the distribution of prompts, r the true reward.
Equations are those of the SELM paper, arXiv 2405.19332.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from selm_jax.lab.worlds import Scalar, Table, World


def mean(world: World, log_policy: Table, of: Table) -> Scalar:
    """The mean of a table under the policy: E_{x~nu, y~pi}[of(x, y)]."""
    return jnp.sum(world.prompts[:, None] * jnp.exp(log_policy) * of)


def kl(world: World, log_p: Table, log_q: Table) -> Scalar:
    """The mean KL divergence over prompts, E_x KL(p || q), in nats per response."""
    return mean(world, log_p, log_p - log_q)


def tilt(log_reference: Table, reward: Table, beta: float) -> Table:
    """Returns log pi_r, where pi_r(y|x) is proportional to pi_ref(y|x) exp(r(x, y) / beta)."""
    return jax.nn.log_softmax(log_reference + reward / beta, axis=-1)


def optimum(world: World) -> Table:
    """Returns log pi_star, which maximises J(pi) = E_pi[r] - beta KL(pi || pi_ref) (eq. 3.3)."""
    return tilt(world.log_reference, world.reward, world.beta)


def regret(world: World, log_policy: Table) -> Scalar:
    """The regret J(pi_star) - J(pi), computed more accurately as beta KL(pi || pi_star)."""
    return world.beta * kl(world, log_policy, optimum(world))


def mass_on_good(world: World, log_policy: Table) -> Scalar:
    """The probability of the responses with the highest reward (`World.good`)."""
    return mean(world, log_policy, world.good)
