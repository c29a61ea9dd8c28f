"""Samples of two policies against the laboratory's closed forms and against the plain engine."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.config import Mixture
from selm_jax.lab import samplers
from selm_jax.models.decoder import Decoder
from selm_jax.rollout.engine import Engine
from selm_jax.rollout.mixtures import weight_of
from selm_jax.rollout.parameters import decoding_params
from selm_jax.rollout.requests import Request
from selm_jax.rollout.sampling import Sampling

WEIGHT = 0.4
PILAF = Mixture("pilaf", WEIGHT)


@pytest.fixture(scope="module")
def world(tiny, random_params):
    """An engine of 24 tokens without a mixture, and the parameters of two models."""
    config = tiny(vocab_size=24)
    models = tuple(
        decoding_params(random_params(config, seed=seed), jnp.float32) for seed in (0, 1)
    )
    engine = Engine(
        Decoder(config, scan=False), Sampling(), slots=8, max_prompt=16, max_new_tokens=6,
        stop_ids=(5,), prefill_rows=4,
    )  # fmt: skip
    return engine, models


def mixing(engine, mixture, **changes):
    return dataclasses.replace(engine, mixture=mixture, **changes)


def requests(prompts=8, samples=4):
    rng = np.random.default_rng(1)
    return [
        Request(i, tuple(rng.integers(0, 24, rng.integers(1, 17)).tolist()), i % 2, samples)
        for i in range(prompts)
    ]


def answers(engine, params, wanted):
    return engine.generate(params, wanted, seed=3, iteration=1)


def bits(responses):
    return [(r.index, r.sample, r.tokens, r.finish, r.logps, r.sampled_logps) for r in responses]


@pytest.fixture(scope="module")
def pilaf(world):
    engine, models = world
    return answers(mixing(engine, PILAF), models, requests())


def test_a_mixture_of_a_policy_with_itself_is_the_plain_engine_to_the_bit(world):
    engine, (policy, _) = world
    plain = answers(engine, policy, requests())
    assert bits(answers(mixing(engine, PILAF), (policy, policy), requests())) == bits(plain)


def test_policy_against_reference_is_one_plain_engine_and_the_other_in_turns(world):
    engine, (policy, reference) = world
    found = answers(mixing(engine, Mixture("policy_reference")), (policy, reference), requests())
    first, second = (answers(engine, each, requests()) for each in (policy, reference))
    for mine, a, b in zip(found, first, second, strict=True):
        whose = b if mine.sample and mine.sample % 2 == 0 else a
        assert (mine.tokens, mine.sampled_logps) == (whose.tokens, whose.sampled_logps)
    assert any(a.tokens != b.tokens for a, b in zip(first, second, strict=True))


def test_each_sample_is_drawn_from_the_laboratorys_mixture(world, pilaf, all_logits):
    """Kept are the log-probabilities of the mixture that a sample was drawn from, and the
    policy's, at every token; greedy answers are the policy's."""
    engine, models = world
    prompts = {r.index: r.prompt for r in requests()}
    logits_of = [jax.jit(partial(all_logits, engine.decoder, each)) for each in models]
    raised = Counter()
    for r in pilaf:
        before = len(prompts[r.index]) - 1
        tokens = np.zeros((1, 24), np.int32)
        tokens[0, : before + 1 + len(r.tokens)] = (*prompts[r.index], *r.tokens)
        policy, reference = (
            jax.nn.log_softmax(each(tokens)[0, before : before + len(r.tokens)])
            for each in logits_of
        )

        def of_tokens(logps, r=r):
            return np.asarray(logps)[np.arange(len(r.tokens)), r.tokens]

        np.testing.assert_allclose(r.logps, of_tokens(policy), atol=1e-4)
        if r.greedy:
            assert not any(r.sampled_logps) and r.tokens[0] == policy[0].argmax()
            continue
        sign = -1 if r.sample % 2 else 1  # raised, then lowered
        tilted = of_tokens(samplers.mixed(policy, reference, sign * WEIGHT))
        of_pair = np.abs(tilted - r.sampled_logps).max() < 1e-4
        expected = tilted if of_pair else of_tokens(policy)
        np.testing.assert_allclose(r.sampled_logps, expected, atol=1e-4)
        raised[r.index, (r.sample + 1) // 2] += of_pair
    assert set(raised.values()) == {0, 2}, "both samples of a pair are of one kind"
    assert 4 <= sum(n == 2 for n in raised.values()) <= 12  # a fair coin for each of 16 pairs


def test_slots_and_neighbours_change_nothing(world, pilaf):
    engine, models = world
    few = mixing(engine, PILAF, slots=3, prefill_rows=1)
    found = answers(few, models, list(reversed(requests()))[:5])
    assert found == [r for r in pilaf if r.index >= 3]


def test_which_sample_has_which_weight():
    def weights(kind, weight, coin=0):
        return [weight_of(Mixture(kind, weight), n, lambda _: coin) for n in range(6)]

    assert weights("geometric", 0.3) == [0, 0.3, 0.3, 0.3, 0.3, 0.3]
    assert weights("nash", 0.3) == [0, 0, 0.3, 0, 0.3, 0]
    assert weights("policy_reference", None) == [0, 0, 1, 0, 1, 0]
    assert weights("dpo_mix", 0.5) == [0, 0, 0, -0.5, 0.5, 0]
    assert weights("pilaf", 0.1, coin=0) == [0] * 6
    assert weights("pilaf", 0.1, coin=1) == [0, -0.1, 0.1, -0.1, 0.1, -0.1]
