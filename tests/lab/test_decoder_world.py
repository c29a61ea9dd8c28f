"""A real decoder: its exact gradients against those of the packed update, and its world."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.lab import algorithms, decoder_world, exact, rounds
from selm_jax.objectives.losses import selm

OBJECTIVE = selm(1.0, 0.3)


@pytest.fixture(scope="module")
def dw():
    return decoder_world.make(prompts=2, length=3)


@pytest.fixture(scope="module")
def moved(dw):
    """Parameters away from the reference, and their exact table."""
    keys = iter(jax.random.split(jax.random.key(3), 100))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), dw.params)
    return params, table(dw, params)


def table(dw, params):
    return jax.jit(decoder_world.log_policy, static_argnums=0)(dw.decoder, params, dw.tree)


def sampled(dw, policy, count, seed=0):
    slots = policy, dw.world.log_reference
    return rounds.sample(
        jax.random.key(seed), dw.world, slots, (1.0, 1.0), algorithms.Settings(), count, explore=1
    )


def test_every_response_is_listed_once_and_they_sum_to_one(dw, moved):
    assert len(set(dw.responses)) == len(dw.responses) == 1 + 4 + 16 + 64
    for log_policy in (dw.world.log_reference, moved[1]):
        np.testing.assert_allclose(jnp.exp(log_policy).sum(axis=1), 1, rtol=1e-5)
    assert np.all(dw.world.good.sum(axis=1) == 1)


def test_the_packed_update_has_the_exact_gradient_of_its_pairs(dw, moved):
    """The gradient through the listed world, and through examples packed many to a row."""
    params, log_policy = moved
    data = sampled(dw, log_policy, 40)
    update, *_ = decoder_world.compiled(dw.decoder, OBJECTIVE)
    found = decoder_world.examples(dw, data, dw.world.log_reference)
    packed, sums = decoder_world.packed_gradient(update, params, found)

    def listed(p):
        log_pi = decoder_world.log_policy(dw.decoder, p, dw.tree)
        return rounds.mean_loss(OBJECTIVE, log_pi, dw.world.log_reference, data)

    value, slope = jax.jit(jax.value_and_grad(listed))(params)
    assert sums["examples"] == 40
    np.testing.assert_allclose(sums["loss"] / 40, value, rtol=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(slope))
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(slope), strict=True):
        np.testing.assert_allclose(a / 40, b, atol=2e-6 * max(scale, 1))


def test_the_packed_gradient_is_an_unbiased_one_of_the_exact_expectation(dw, moved):
    """Along a fixed direction, the mean over batches lies within 4 standard errors."""
    params, log_policy = moved
    settings = algorithms.Settings()
    pairs = rounds.every_pair(dw.world, log_policy, dw.world.log_reference, settings)
    fit = rounds.as_examples(pairs)
    update, *_ = decoder_world.compiled(dw.decoder, OBJECTIVE)
    parts = selm(1.0, 0.0), 0.3

    def expected(p):
        log_pi = decoder_world.log_policy(dw.decoder, p, dw.tree)
        data_loss = rounds.mean_loss(parts[0], log_pi, dw.world.log_reference, fit)
        lowered = exact.mean(dw.world, dw.world.log_reference, log_pi - dw.world.log_reference)
        return data_loss + parts[1] * lowered

    slope = jax.jit(jax.grad(expected))(params)
    along = []
    for seed in range(24):
        data = sampled(dw, log_policy, 32, seed)
        found = decoder_world.examples(dw, data, dw.world.log_reference)
        packed, _ = decoder_world.packed_gradient(update, params, found)
        along.append(
            sum(
                jnp.vdot(a / 32, b)
                for a, b in zip(*map(jax.tree.leaves, (packed, slope)), strict=True)
            )
        )
    target = sum(jnp.vdot(b, b) for b in jax.tree.leaves(slope))
    along = np.array(along)
    assert abs(along.mean() - target) < 4 * along.std(ddof=1) / len(along) ** 0.5


@pytest.mark.slow
def test_a_run_repeats_itself_and_starts_at_the_reference(dw):
    settings = {"rounds": 2, "queries": 4, "updates": 2}
    one = decoder_world.run(dw, OBJECTIVE, **settings)
    assert one == decoder_world.run(dw, OBJECTIVE, **settings)
    assert one != decoder_world.run(dw, OBJECTIVE, seed=1, **settings) and min(one) > 0
    still = decoder_world.run(dw, OBJECTIVE, rate=0.0, **settings)
    np.testing.assert_allclose(still, exact.regret(dw.world, dw.world.log_reference), rtol=1e-5)


def test_too_many_prompts_are_refused():
    with pytest.raises(ValueError, match="one letter"):
        decoder_world.make(prompts=5)
