"""Computes the constants of Theorem 5.3 of SELM (arXiv 2405.19332), such as alpha.

The theorem is about Algorithm 2 over T rounds, a policy class of finite size |Pi| in which
|log pi / pi_ref| <= R_max, and its preference complexity d. The weight of the term is alpha (not
alpha * beta), and L_DPO is a mean over the data. The theorem holds with probability 1 - delta, up
to a constant that is not given.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from selm_jax.lab import exact
from selm_jax.lab.worlds import Scalar, World


class Constants(NamedTuple):
    """The constants of Theorem 5.3, and its bound on cumulative regret up to an unknown factor."""

    r_max: Scalar
    log_size: Scalar  # log(|Pi| / delta)
    eta: Scalar
    alpha: Scalar
    bound: Scalar


def constants(
    r_max: float | Scalar, d: float, rounds: float, log_size: float | Scalar
) -> Constants:
    """Computes the constants of Theorem 5.3 (eta and alpha) and its bound.

    eta = sqrt(T d / (exp(4 R_max) log(|Pi|/delta))), alpha = 2 / (eta exp(4 R_max)).

    This equals alpha = 2 exp(-2 R_max) sqrt(log(|Pi|/delta) / (T d)), which does not overflow.
    """
    r_max, log_size = jnp.asarray(r_max), jnp.asarray(log_size)
    eta = jnp.exp(-2 * r_max) * jnp.sqrt(rounds * d / log_size)
    alpha = 2 * jnp.exp(-2 * r_max) * jnp.sqrt(log_size / (rounds * d))
    bound = jnp.exp(2 * r_max) * jnp.sqrt(d * rounds * log_size)
    return Constants(r_max, log_size, eta, alpha, bound)


def of_world(world: World, rounds: int, delta: float = 0.05) -> Constants:
    """Computes the constants of Theorem 5.3 for a world, with the smallest valid R_max.

    A log-linear class is infinite, so |Pi| is the size of a cover of its parameters with resolution
    1/T: (1 + 2 R_max T)^d.
    """
    d = world.dimension
    r_max = jnp.max(jnp.abs(exact.optimum(world) - world.log_reference))
    log_size = d * jnp.log1p(2 * r_max * rounds) - jnp.log(delta)
    return constants(r_max, d, rounds, log_size)
