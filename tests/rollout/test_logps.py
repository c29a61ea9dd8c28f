"""The log-probabilities that the engine keeps are those of the scorer, and of what it drew from."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.models.decoder import Decoder
from selm_jax.preferences.examples import Example
from selm_jax.preferences.layouts import OneShape
from selm_jax.rollout.engine import Engine
from selm_jax.rollout.parameters import decoding_params
from selm_jax.rollout.requests import Request
from selm_jax.rollout.sampling import Sampling
from selm_jax.training.scoring import Scorer, readers

STOPS = (5, 17, 60)


def only_even(logits, t):
    return jnp.where(jnp.arange(logits.shape[-1]) % 2 == 0, logits, -jnp.inf)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    most = logits.max()
    return logits - most - np.log(np.exp(logits - most).sum())


def drawn_from(logits, s):
    """The log-probabilities of a sampled token, by sorting."""
    logits = np.asarray(logits, np.float64)
    if s.filter is not None:
        logits = np.where(np.arange(len(logits)) % 2 == 0, logits, -np.inf)
    p = np.exp((logits - logits.max()) / s.temperature)
    ranked = np.sort(p)[::-1]
    if s.top_k:
        p[p < ranked[min(s.top_k, len(p)) - 1]] = 0
    if s.top_p < 1:
        ranked = np.sort(p)[::-1]
        enough = np.searchsorted(np.cumsum(ranked), s.top_p * p.sum())
        p[p < ranked[min(enough, len(p) - 1)]] = 0
    p[p < s.min_p] = 0
    with np.errstate(divide="ignore"):
        return np.log(p / p.sum())


@pytest.mark.slow_except("sampling2")
@pytest.mark.parametrize(
    ("sampling", "slots", "most"),
    [
        (Sampling(), 7, 12),
        pytest.param(Sampling(temperature=0.5), 1, 12, marks=pytest.mark.slow),
        (Sampling(temperature=1.2, top_k=60, top_p=0.97, min_p=0.01), 16, 12),
        pytest.param(Sampling(top_p=0.6), 5, 200, marks=pytest.mark.slow),  # its cache grows
        (Sampling(temperature=0.8, filter=only_even), 6, 12),
    ],
)
def test_kept_logps_are_the_scorers(sampling, slots, most, tiny, random_params, all_logits):
    config = tiny()
    stacked = random_params(config)
    params = decoding_params(stacked, jnp.float32)
    decoder = Decoder(config, scan=False)
    engine = Engine(
        decoder, sampling, slots=slots, max_prompt=24, max_new_tokens=most, stop_ids=STOPS
    )
    rng = np.random.default_rng(slots)
    requests = [
        Request(i, tuple(rng.integers(0, 96, rng.integers(1, 24)).tolist()), i % 2, 3)
        for i in range(6)
    ]
    found = engine.generate(params, requests, seed=3, iteration=1)
    prompts = {r.index: r.prompt for r in requests}

    examples = [Example(str(r.index), prompts[r.index], (r.tokens,), {}) for r in found]
    scorer = Scorer(readers(Decoder(config), 8), lambda batch: batch, OneShape(4, None))
    for response, (scored,) in zip(found, scorer.statistics(stacked, examples), strict=True):
        np.testing.assert_allclose(response.logps, scored.logprob, atol=1e-4)

    for response in found[:8]:
        prompt = prompts[response.index]
        logits = all_logits(decoder, params, np.array([prompt + response.tokens]))[0]
        for t, token in enumerate(response.tokens):
            at = logits[len(prompt) - 1 + t]
            assert response.logps[t] == pytest.approx(log_softmax(at)[token], abs=1e-4)
            expected = 0 if response.greedy else drawn_from(at, sampling)[token]
            assert response.sampled_logps[t] == pytest.approx(expected, abs=1e-4)
