import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from selm_jax.lab import exact
from selm_jax.lab.worlds import (
    LANDSCAPES,
    REWARDED,
    WorldShape,
    _winner,
    cross,
    make_world,
)


@pytest.mark.slow_except("5", "None")
@pytest.mark.parametrize("landscape", LANDSCAPES)
@pytest.mark.parametrize("dimension", [None, 1, 5])
def test_the_optimum_is_in_the_class(world, landscape, dimension):
    w = world(landscape=landscape, dimension=dimension)
    np.testing.assert_allclose(w.log_policy(w.theta_star), exact.optimum(w), atol=1e-10)


@pytest.mark.parametrize("landscape", [*REWARDED, "wrong"])
def test_rewards_fill_the_unit_interval_and_coverage_is_the_mass_on_the_best(world, landscape):
    w = world(landscape=landscape, coverage=0.03, responses=32)
    assert w.reward.min() >= 0 and np.allclose(w.reward.max(axis=1), 1)
    assert np.allclose(w.good.sum(axis=1), 2)
    worst_good = jnp.where(w.good > 0, w.reward, 1).min(axis=1)
    assert jnp.all(worst_good >= jnp.where(w.good > 0, 0, w.reward).max(axis=1))
    np.testing.assert_allclose(exact.mass_on_good(w, w.log_reference), 0.03, rtol=1e-9)
    np.testing.assert_allclose(jnp.exp(w.log_reference).sum(axis=1), 1, rtol=1e-9)


def test_the_better_peak_lies_where_the_reference_is_not(world):
    w = world(responses=32, coverage=0.01)
    seen = exact.mean(w, w.log_reference, w.reward)
    best_elsewhere = jnp.where(w.good > 0, 0, w.reward).max(axis=1)
    assert seen < best_elsewhere.min() < 1
    needle = world(landscape="needle")
    np.testing.assert_array_equal(needle.reward.sum(axis=1), 1)


def test_features_are_shared_and_of_length_one_on_average(world):
    w = world(prompts=40, dimension=6)
    lengths = jnp.sum(w.features**2, axis=-1)
    assert 0.8 < lengths.mean() < 1.2


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        WorldShape(prompts=0)
    with pytest.raises(ValueError, match="positive"):
        WorldShape(beta=0)
    with pytest.raises(ValueError, match="hill"):
        make_world(jax.random.key(0), WorldShape(), "hill")


# --- the cyclic world ----------------------------------------------------------------------------


def payoffs(w, x):
    """The payoff of every response against every other, from the definition."""
    gap = w.reward[x][:, None] - w.reward[x][None, :]
    return np.asarray(gap + cross(w.turn[x][:, None], w.turn[x][None, :]))


@pytest.mark.parametrize("landscape", LANDSCAPES)
def test_the_optimum_has_no_regret_and_others_have_some(world, landscape):
    w = world(landscape=landscape, dimension=None)
    assert abs(exact.regret(w, exact.optimum(w))) < 1e-12
    for seed in range(3):
        other = jax.nn.log_softmax(jax.random.normal(jax.random.key(seed), w.reward.shape))
        assert exact.regret(w, other) > 0.01


def test_three_responses_beat_each_other_and_all_others(world):
    w = world(landscape="cyclic", responses=16)
    for x in range(3):
        (three,) = np.nonzero(w.good[x])
        table = payoffs(w, x)[np.ix_(three, three)]
        np.testing.assert_allclose(np.sort(table, axis=1), [[-1, 0, 1]] * 3, atol=1e-12)
        assert np.all(payoffs(w, x)[three][:, np.asarray(w.good[x]) == 0] > 0)
    assert not np.any(world(landscape="two_peaks").turn)


def test_the_winner_without_a_penalty_is_that_of_linear_programming(world):
    """The von Neumann winner: the mixture whose payoff against each response is at least 0."""
    w = world(landscape="cyclic", responses=16)
    table = payoffs(w, 0)
    n = len(table)
    found = scipy.optimize.linprog(
        np.r_[np.zeros(n), -1], A_ub=np.c_[-table.T, np.ones(n)], b_ub=np.zeros(n),
        A_eq=[np.r_[np.ones(n), 0]], b_eq=[1], bounds=[(0, 1)] * n + [(None, None)],
    )  # fmt: skip
    assert abs(found.fun) < 1e-9  # the value of a symmetric game
    np.testing.assert_allclose(found.x[:n], w.good[0] / 3, atol=1e-9)
    # The optimum with a small penalty is near it.
    m = _winner(w.log_reference, w.reward, w.turn, 0.01)[:, None]
    near = jnp.exp(exact.tilt(w.log_reference, w.reward + cross(w.turn, m), 0.01))
    np.testing.assert_allclose(near[0], w.good[0] / 3, atol=0.02)


@pytest.mark.parametrize("coverage", [0.002, 0.2])
def test_the_winner_is_found_in_every_world(coverage):
    shape = WorldShape(prompts=200, responses=16, dimension=4)
    w = jax.jit(make_world, static_argnums=(1, 2))(jax.random.key(7), shape, "cyclic", coverage)
    best = exact.best_response(w, exact.optimum(w))
    np.testing.assert_allclose(jnp.exp(best), jnp.exp(exact.optimum(w)), atol=1e-4)
    assert 0.1 < exact.mass_on_good(w, exact.optimum(w)) <= 1


def test_regret_is_what_the_best_opponent_gains(world):
    """By search over opponents, from the payoffs alone."""
    w = world(landscape="cyclic", dimension=None, prompts=1)
    log_policy = jax.nn.log_softmax(jax.random.normal(jax.random.key(5), w.reward.shape))
    table, cost = payoffs(w, 0), w.beta * exact.kl(w, log_policy, w.log_reference)

    def gain(z):
        opponent = jax.nn.log_softmax(z)
        won = jnp.exp(opponent) @ table @ jnp.exp(log_policy[0])
        return won - w.beta * exact.kl(w, opponent[None], w.log_reference) + cost

    slope = jax.jit(jax.value_and_grad(lambda z: -gain(z)))
    found = scipy.optimize.minimize(
        lambda z: [np.asarray(v) for v in slope(z)], np.zeros(8), jac=True, tol=1e-12
    )
    np.testing.assert_allclose(-found.fun, exact.regret(w, log_policy), rtol=1e-6)


def test_the_confidently_wrong_reference_prefers_the_worst(world):
    w = world(landscape="wrong", responses=16)
    assert exact.mean(w, w.log_reference, w.reward) < 0.25
    order = jnp.argsort(w.reward, axis=1)
    p = jnp.take_along_axis(jnp.exp(w.log_reference), order, axis=1)
    assert jnp.all(p[:, :4].sum(1) > 0.8) and jnp.all(p[:, -1] > p[:, -4:-1].max(1))
