"""Samplers against closed forms and against the enumeration of all draws, in double precision."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.lab import samplers
from selm_jax.lab.arms import SAMPLERS
from selm_jax.lab.samplers import Two


@pytest.fixture
def two(double):
    """A policy and a reference over five responses to two prompts."""
    keys = jax.random.split(jax.random.key(3))
    policy, reference = (jax.nn.log_softmax(jax.random.normal(k, (2, 5), "float64")) for k in keys)
    return Two(policy, reference, 0.7)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_probabilities_add_up_to_one(two, sampler):
    pairs = sampler(two)
    np.testing.assert_allclose(pairs.joint().sum((1, 2)), 1, rtol=1e-9)
    np.testing.assert_allclose(pairs.share.sum(0), 1, rtol=1e-12)


@pytest.mark.parametrize("name, base", [("pilaf", "policy"), ("dpo_mix", "uniform")])
def test_mixtures_undo_the_weight_that_dpo_gives_to_a_pair(two, name, base):
    """An unordered pair has a density proportional to base base' / (s (1 - s))."""
    found = getattr(samplers, name)(two).joint()
    found = found + found.swapaxes(1, 2)
    b = jnp.exp(two.policy) if base == "policy" else jnp.full((2, 5), 0.2)
    r = two.lean * (two.policy - two.reference)
    s = jax.nn.sigmoid(r[:, :, None] - r[:, None, :])
    expected = b[:, :, None] * b[:, None, :] / (s * (1 - s))
    expected = 2 * expected / expected.sum((1, 2), keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_the_tilted_pair_of_pilaf_extrapolates_and_interpolates(two):
    pairs = samplers.pilaf(two)
    raised, lowered = pairs.first[1], pairs.second[1]
    np.testing.assert_allclose(raised, samplers.mixed(*two[:2], -two.lean), rtol=1e-10)
    np.testing.assert_allclose(lowered, samplers.mixed(*two[:2], two.lean), rtol=1e-10)


def test_a_mixture_ends_at_its_parts(two):
    for weight, part in ((0.0, two.policy), (1.0, two.reference)):
        np.testing.assert_allclose(samplers.mixed(*two[:2], weight), part, rtol=1e-12)
    half = jnp.sqrt(jnp.exp(two.policy + two.reference))
    np.testing.assert_allclose(
        jnp.exp(samplers.nash(two).second[0]), half / half.sum(-1, keepdims=True), rtol=1e-10
    )


def test_best_and_worst_of_n_by_enumeration(two):
    first, second = (
        samplers.extremes(two, 3).joint().sum(2),
        samplers.extremes(two, 3).joint().sum(1),
    )
    p, score = (np.asarray(x) for x in (jnp.exp(two.policy), two.policy - two.reference))
    for x in range(2):
        best, worst = np.zeros(5), np.zeros(5)
        for drawn in itertools.product(range(5), repeat=3):
            chance = np.prod(p[x, list(drawn)])
            best[max(drawn, key=lambda y: score[x, y])] += chance
            worst[min(drawn, key=lambda y: score[x, y])] += chance
        np.testing.assert_allclose(first[x], best, rtol=1e-9)
        np.testing.assert_allclose(second[x], worst, rtol=1e-9)


def test_without_an_opinion_best_of_n_is_the_policy(two):
    same = two._replace(reference=two.policy)
    np.testing.assert_allclose(samplers.extremes(same).first[0], two.policy, rtol=1e-9)
    np.testing.assert_allclose(samplers.pilaf(same).joint(), _product(two.policy), rtol=1e-9)


def _product(log_policy):
    return jnp.exp(log_policy[:, :, None] + log_policy[:, None, :])
