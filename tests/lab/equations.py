"""Quantities of the SELM paper (arXiv 2405.19332), computed from their definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Float

from selm_jax.lab import exact
from selm_jax.lab.worlds import Scalar, Table, World


def value(world: World, log_policy: Table) -> Scalar:
    """J(pi) = E_pi[r] - beta KL(pi || pi_ref), equation 3.3. pi_ref is the world's own."""
    reward = exact.mean(world, log_policy, world.reward)
    return reward - world.beta * exact.kl(world, log_policy, world.log_reference)


def implicit_reward(log_policy: Table, log_reference: Table, beta: float) -> Table:
    """beta log(pi / pi_ref)."""
    return beta * (log_policy - log_reference)


def mean_implicit_reward(world: World, log_policy: Table, log_reference: Table) -> Scalar:
    """E_{pi_ref}[implicit reward] = -beta KL(pi_ref || pi): what the optimism term pushes down."""
    rhat = implicit_reward(log_policy, log_reference, world.beta)
    return exact.mean(world, log_reference, rhat)


def coverage(world: World) -> Scalar:
    """max pi_star / pi_ref: how much more probable a response is under the optimum."""
    return jnp.exp(jnp.max(exact.optimum(world) - world.log_reference))


def reward_loss(reward: Table, pairs: Float[Array, "prompts first second"]) -> Scalar:
    """L_lr, equation 3.2: pairs[x, w, l] is the weight of "w beats l" at prompt x."""
    margins = reward[:, :, None] - reward[:, None, :]
    return -jnp.sum(pairs * jax.nn.log_sigmoid(margins)) / jnp.sum(pairs)


def inner_value(world: World, log_policy: Table, reward: Table) -> Scalar:
    """F(pi; r) = E_{y~pi, y'~pi_ref}[r(y) - r(y')] - beta KL(pi || pi_ref), equation 4.1."""
    gain = exact.mean(world, log_policy, reward) - exact.mean(world, world.log_reference, reward)
    return gain - world.beta * exact.kl(world, log_policy, world.log_reference)


def inner_maximum(world: World, reward: Table) -> Scalar:
    """max_pi F(pi; r) = beta KL(pi_ref || pi_r), Appendix A.1 in closed form."""
    return world.beta * exact.kl(
        world, world.log_reference, exact.tilt(world.log_reference, reward, world.beta)
    )


def inner_maximum_by_search(world: World, reward: Table) -> tuple[float, Table]:
    """`inner_maximum` found by BFGS over all policies, from F and its gradient alone."""
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
    """-L_lr(r; D) + alpha max_pi F(pi; r), which equation 4.1 maximises over r."""
    return -reward_loss(reward, pairs) + alpha * inner_maximum(world, reward)


def minimiser_around(log_rho: Table, log_reference: Table, beta: float) -> Table:
    """argmin_pi E_pi[r_rho] + beta KL(pi || pi_rho), r_rho the implicit reward of pi_rho.

    Theorem 5.1 says that it is pi_ref for every rho; here it is computed from its definition.
    """
    return exact.tilt(log_rho, -implicit_reward(log_rho, log_reference, beta), beta)
