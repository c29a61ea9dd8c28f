"""Exact quantities of a world: sums over all prompts and responses.

Policies are tables of log-probabilities. nu is the distribution of prompts, r the true reward.
Equations are those of the SELM paper, arXiv 2405.19332.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Float

from selm_jax.lab.worlds import Scalar, Table, World


def mean(world: World, log_policy: Table, of: Table) -> Scalar:
    """E_{x~nu, y~pi}[of(x, y)]."""
    return jnp.sum(world.prompts[:, None] * jnp.exp(log_policy) * of)


def kl(world: World, log_p: Table, log_q: Table) -> Scalar:
    """E_x KL(p || q), in nats per response."""
    return mean(world, log_p, log_p - log_q)


def value(world: World, log_policy: Table) -> Scalar:
    """J(pi) = E_pi[r] - beta KL(pi || pi_ref), equation 3.3. pi_ref is the world's own."""
    reward = mean(world, log_policy, world.reward)
    return reward - world.beta * kl(world, log_policy, world.log_reference)


def tilt(log_reference: Table, reward: Table, beta: float) -> Table:
    """log pi_r: pi_r(y|x) is in proportion to pi_ref(y|x) exp(r(x, y) / beta)."""
    return jax.nn.log_softmax(log_reference + reward / beta, axis=-1)


def optimum(world: World) -> Table:
    """log pi_star, which maximises `value` over all policies."""
    return tilt(world.log_reference, world.reward, world.beta)


def regret(world: World, log_policy: Table) -> Scalar:
    """J(pi_star) - J(pi), as beta KL(pi || pi_star): the same number, without cancellation."""
    return world.beta * kl(world, log_policy, optimum(world))


def implicit_reward(log_policy: Table, log_reference: Table, beta: float) -> Table:
    """beta log(pi / pi_ref)."""
    return beta * (log_policy - log_reference)


def mean_implicit_reward(world: World, log_policy: Table, log_reference: Table) -> Scalar:
    """E_{pi_ref}[implicit reward] = -beta KL(pi_ref || pi): what the optimism term pushes down."""
    rhat = implicit_reward(log_policy, log_reference, world.beta)
    return mean(world, log_reference, rhat)


def mass_on_good(world: World, log_policy: Table) -> Scalar:
    """Probability of the responses of highest reward (`World.good`)."""
    return mean(world, log_policy, world.good)


def coverage(world: World) -> Scalar:
    """max pi_star / pi_ref: how much more often the optimum says something than the reference."""
    return jnp.exp(jnp.max(optimum(world) - world.log_reference))


def reward_loss(world: World, reward: Table, pairs: Float[Array, "prompts first second"]) -> Scalar:
    """L_lr, equation 3.2: pairs[x, w, l] is the weight of "w beats l" at prompt x."""
    margins = reward[:, :, None] - reward[:, None, :]
    return -jnp.sum(pairs * jax.nn.log_sigmoid(margins)) / jnp.sum(pairs)


def inner_value(world: World, log_policy: Table, reward: Table) -> Scalar:
    """F(pi; r) = E_{y~pi, y'~pi_ref}[r(y) - r(y')] - beta KL(pi || pi_ref), equation 4.1."""
    gain = mean(world, log_policy, reward) - mean(world, world.log_reference, reward)
    return gain - world.beta * kl(world, log_policy, world.log_reference)


def inner_maximum(world: World, reward: Table) -> Scalar:
    """max_pi F(pi; r) = beta KL(pi_ref || pi_r), Appendix A.1 in closed form."""
    return world.beta * kl(
        world, world.log_reference, tilt(world.log_reference, reward, world.beta)
    )


def inner_maximum_by_search(world: World, reward: Table) -> tuple[float, Table]:
    """The same by BFGS over all policies, told nothing but F and its slope. For checking."""
    shape = world.log_reference.shape
    rate = jax.jit(
        jax.value_and_grad(
            lambda z: -inner_value(world, jax.nn.log_softmax(z.reshape(shape)), reward)
        )
    )

    def numbers(z):
        loss, slope = rate(z)
        return float(loss), np.asarray(slope, np.float64)

    start = np.zeros(world.log_reference.size)
    found = scipy.optimize.minimize(
        numbers, start, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 2000}
    )
    return -found.fun, jax.nn.log_softmax(jnp.asarray(found.x).reshape(shape))


def bilevel_value(
    world: World, reward: Table, pairs: Float[Array, "prompts first second"], alpha: float
) -> Scalar:
    """-L_lr(r; D) + alpha max_pi F(pi; r): what equation 4.1 maximises over r."""
    return -reward_loss(world, reward, pairs) + alpha * inner_maximum(world, reward)


def minimiser_around(log_rho: Table, log_reference: Table, beta: float) -> Table:
    """argmin_pi E_pi[r_rho] + beta KL(pi || pi_rho), r_rho the implicit reward of pi_rho.

    Theorem 5.1 says that it is pi_ref for every rho; here it is computed from its definition.
    """
    return tilt(log_rho, -implicit_reward(log_rho, log_reference, beta), beta)
