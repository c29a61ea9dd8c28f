"""Computes a world's exact means, KL, optimum and regret, as sums over all responses.

Policies are tables of log-probabilities. nu is the distribution of prompts, r the true reward.
Equations are those of the SELM paper, arXiv 2405.19332.

Where preferences are cyclic there is no reward to maximise. Policies then play a game: pi gains
E[payoff(y, y')], y ~ pi, y' ~ pi', against pi', and each pays beta KL from the first reference. The
optimum is the policy that no other beats, the von Neumann winner of the game, and the regret of pi
is what the best opponent gains against it. With payoff(y, y') = r(y) - r(y') these are the optimum
and the regret of the paper, so one definition serves all worlds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from selm_jax.lab.worlds import Scalar, Table, World, cross


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
    """Returns log pi_star, which maximises J(pi) = E_pi[r] - beta KL(pi || pi_ref) (eq. 3.3).

    Where preferences are cyclic, it is the von Neumann winner of the KL-regularised game.
    """
    return _against(world, world.balance)


def best_response(world: World, log_policy: Table) -> Table:
    """Returns the log-probabilities of the opponent that gains most against a policy.

    Where nothing is cyclic it is the optimum, whatever the policy.
    """
    return _against(world, jnp.sum(jnp.exp(log_policy)[..., None] * world.turn, axis=1))


def _against(world: World, mean_turn: Float[Array, "prompts 2"]) -> Table:
    """The best response to a policy with this mean turn."""
    payoff = world.reward + cross(world.turn, mean_turn[:, None])
    return tilt(world.log_reference, payoff, world.beta)


def regret(world: World, log_policy: Table) -> Scalar:
    """The regret J(pi_star) - J(pi), computed more accurately as beta KL(pi || pi_star).

    Where preferences are cyclic: the most that an opponent can gain against the policy, which is
    beta KL(pi || best response), because a policy gains 0 against itself.
    """
    return world.beta * kl(world, log_policy, best_response(world, log_policy))


def mass_on_good(world: World, log_policy: Table) -> Scalar:
    """The probability of the responses with the highest reward (`World.good`)."""
    return mean(world, log_policy, world.good)
