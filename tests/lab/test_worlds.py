import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.lab import exact
from selm_jax.lab.worlds import LANDSCAPES, WorldShape, make_world


@pytest.mark.parametrize("landscape", LANDSCAPES)
@pytest.mark.parametrize("dimension", [None, 1, 5])
def test_the_optimum_is_in_the_class(world, landscape, dimension):
    w = world(landscape=landscape, dimension=dimension)
    np.testing.assert_allclose(w.log_policy(w.theta_star), exact.optimum(w), atol=1e-10)


@pytest.mark.parametrize("landscape", LANDSCAPES)
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
