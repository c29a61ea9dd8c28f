"""Identities of the paper (arXiv 2405.19332), each side from its own definition."""

import equations
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.lab import exact
from selm_jax.lab.algorithms import Settings
from selm_jax.lab.rounds import every_pair, expected_bonus
from selm_jax.objectives.losses import optimism


def some(seed, like):
    return jax.random.normal(jax.random.key(seed), like.shape)


@pytest.mark.parametrize("seed", range(3))
def test_inner_maximum_closed_form_is_that_of_a_blind_search(world, seed):
    w = world(seed, prompts=2, responses=5)
    r = some(seed, w.reward)
    found, policy = equations.inner_maximum_by_search(w, r)
    assert abs(found - equations.inner_maximum(w, r)) < 1e-6
    best = exact.tilt(w.log_reference, r, w.beta)
    assert abs(equations.inner_value(w, best, r) - found) < 1e-6
    np.testing.assert_allclose(policy, best, atol=1e-3)


def test_inner_maximum_does_not_see_a_shift_per_prompt(world):
    w = world()
    r, shift = some(1, w.reward), jnp.array([[5.0], [-2.0], [0.3]])
    np.testing.assert_allclose(equations.inner_maximum(w, r + shift), equations.inner_maximum(w, r))
    pairs = every_pair(w, w.log_reference, w.log_reference, Settings())
    np.testing.assert_allclose(
        equations.bilevel_value(w, r + shift, pairs, 0.3), equations.bilevel_value(w, r, pairs, 0.3)
    )


def test_theorem_5_1_whatever_rho_the_minimiser_is_the_reference(world):
    w = world()
    for seed in range(3):
        log_rho = jax.nn.log_softmax(3 * some(seed, w.reward))
        found = equations.minimiser_around(log_rho, w.log_reference, w.beta)
        np.testing.assert_allclose(found, w.log_reference, atol=1e-10)
        # and it is a minimum: E_pi[r_rho] + beta KL(pi || rho) grows in every direction
        rhat = equations.implicit_reward(log_rho, w.log_reference, w.beta)

        def cost(log_pi, log_rho=log_rho, rhat=rhat):
            return exact.mean(w, log_pi, rhat) + w.beta * exact.kl(w, log_pi, log_rho)

        for other in range(4):
            nearby = jax.nn.log_softmax(w.log_reference + 0.1 * some(50 + other, w.reward))
            assert cost(nearby) > cost(w.log_reference)


def test_value_difference_is_a_divergence(world):
    w = world()
    for seed in range(5):
        log_pi = jax.nn.log_softmax(2 * some(seed, w.reward))
        lost = equations.value(w, exact.optimum(w)) - equations.value(w, log_pi)
        np.testing.assert_allclose(exact.regret(w, log_pi), lost, rtol=1e-9)
        assert lost > 0


def test_single_level_objective_is_the_bilevel_one_at_the_implicit_reward(world):
    """Equation 4.2, with the constant that the code keeps, is 4.1 at r = beta log(pi / pi_ref)."""
    w, alpha = world(), 0.4
    log_pi = w.log_policy(some(3, w.theta_star))
    pairs = every_pair(w, w.log_reference, w.log_reference, Settings(temperature=1.0))
    rhat = equations.implicit_reward(log_pi, w.log_reference, w.beta)
    bonus = expected_bonus(optimism(alpha * w.beta), w, w.log_reference, log_pi, w.log_reference)
    single = -equations.reward_loss(rhat, pairs) - bonus
    np.testing.assert_allclose(equations.bilevel_value(w, rhat, pairs, alpha), single, rtol=1e-9)
    # E_ref[implicit reward] = -beta KL(ref || pi)
    mean = equations.mean_implicit_reward(w, log_pi, w.log_reference)
    np.testing.assert_allclose(mean, -w.beta * exact.kl(w, w.log_reference, log_pi), rtol=1e-9)


def test_optimism_gradient_as_an_expectation_under_the_policy(world):
    """E_ref[grad log pi] = E_pi[exp(-rhat / beta) grad log pi], the form of equation 4.3."""
    w = world()
    theta = some(4, w.theta_star)
    slopes = jax.jacobian(w.log_policy)(theta)
    log_pi = w.log_policy(theta)
    rhat = equations.implicit_reward(log_pi, w.log_reference, w.beta)

    def mean(weights):
        return jnp.einsum("x,xy,xyd->d", w.prompts, weights, slopes)

    left = mean(jnp.exp(w.log_reference))
    np.testing.assert_allclose(left, mean(jnp.exp(log_pi - rhat / w.beta)), rtol=1e-9)


def test_in_a_table_the_term_pushes_along_what_the_policy_already_prefers(world):
    """The slope of E_ref[log pi] by the logits is nu (pi_ref - pi): descent adds pi - pi_ref."""
    w = world(dimension=None)
    theta = some(6, w.theta_star)
    log_pi = w.log_policy(theta)

    def bonus(theta):
        log_policy = w.log_policy(theta)
        return expected_bonus(optimism(1.0), w, w.log_reference, log_policy, w.log_reference)

    expected = w.prompts[:, None] * (jnp.exp(w.log_reference) - jnp.exp(log_pi))
    np.testing.assert_allclose(jax.grad(bonus)(theta), expected.reshape(-1), atol=1e-12)


def test_coverage_of_the_optimum_by_itself_is_one(world):
    w = world()
    assert equations.coverage(w) > 1
    there = w.replace(log_reference=exact.optimum(w), reward=jnp.zeros_like(w.reward))
    np.testing.assert_allclose(equations.coverage(there), 1)
