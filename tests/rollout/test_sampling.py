"""From logits to a token: exact inverse, right frequencies, filters as defined, streams apart."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from selm_jax.config import Rollout
from selm_jax.rollout.sampling import (
    NOTHING_LEFT,
    Sampling,
    draw,
    next_tokens,
    probabilities,
    stream,
    uniforms,
)

draws = jax.jit(draw)


def weights(seed: int, vocab: int, zero: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    p = rng.exponential(size=vocab) ** 2
    p[rng.random(vocab) < zero] = 0
    p[int(rng.integers(vocab))] = 1
    return p.astype(np.float32)


# --- drawing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [2, 255, 256, 257, 1000])
def test_a_draw_inverts_the_cumulative_distribution(vocab):
    """The middle of every token's share of [0, 1) draws that token, and only its neighbourhood."""
    p = weights(0, vocab, zero=0.3)
    share = p.astype(np.float64) / p.sum(dtype=np.float64)
    middle = np.cumsum(share) - share / 2
    wanted = np.flatnonzero(share > 1e-5)
    got = draws(np.broadcast_to(p, (len(wanted), vocab)), middle[wanted].astype(np.float32))
    np.testing.assert_array_equal(got, wanted)


@given(st.integers(0, 2**32 - 1), st.integers(1, 600), st.sampled_from([0.0, 0.5, 0.99]))
@settings(max_examples=30, deadline=None)
def test_any_number_draws_what_numpys_search_draws(seed, vocab, zero):
    p = np.pad(weights(seed, vocab, zero), (0, 600 - vocab))  # one shape: one compilation
    u = np.random.default_rng(seed).random(50, np.float32)
    got = np.asarray(draws(np.broadcast_to(p, (50, 600)), u))
    assert (p[got] > 0).all()
    edges = np.cumsum(p.astype(np.float64)) / p.sum(dtype=np.float64)
    exact = np.searchsorted(edges, u, side="right")
    far = np.abs(edges[np.minimum(np.minimum(got, exact), 599)] - u) > 2e-6  # beyond rounding
    np.testing.assert_array_equal(got[far], exact[far])


@pytest.mark.parametrize(("vocab", "count"), [(40, 100_000), (49152, 10_000), (128256, 10_000)])
def test_frequencies_are_the_probabilities(vocab, count):
    """Chi-squared over 40 bins of tokens."""
    p = weights(1, vocab, zero=0.2)
    u = np.asarray(jax.random.uniform(jax.random.key(0), (count // 100, 100)))
    run = jax.jit(lambda u: jax.lax.map(lambda u: draw(jnp.broadcast_to(p, (100, vocab)), u), u))
    found = np.asarray(run(u)).ravel()
    assert (p[found] > 0).all()
    bins = np.arange(vocab) * 40 // vocab
    expected = np.bincount(bins, p.astype(np.float64))
    observed = np.bincount(bins[found], minlength=40)
    kept = expected > 0
    expected = expected[kept] / expected.sum() * count
    assert stats.chisquare(observed[kept], expected).pvalue > 1e-3


@pytest.mark.parametrize("vocab", [7, 300, 49152, 128256])
def test_a_token_of_probability_zero_is_never_drawn(vocab):
    """Only a few tokens have mass, not the first or last, and the random numbers are at the edges.

    Beyond 65,536 tokens there are more than 256 blocks, whose running sum XLA rounds in parallel.
    """
    rng = np.random.default_rng(0)
    edges = np.array([0, 2**-24, 2**-23, 0.5, 1 - 2**-23, 1 - 2**-24], np.float32)
    for _ in range(4):
        p = np.zeros(vocab, np.float32)
        some = rng.choice(np.arange(1, vocab - 1), min(vocab - 2, 40), replace=False)
        p[some] = rng.exponential(size=len(some)) ** 6
        p[some[0]] = 1
        near = np.cumsum(p.astype(np.float64))[some] / p.sum(dtype=np.float64)
        steps = np.arange(-3, 4) * 2.0**-24
        u = np.clip((near[:, None] + steps).ravel(), 0, 1 - 2**-24).astype(np.float32)
        u = np.resize(np.concatenate([edges, u]), 300)
        found = np.asarray(draws(np.broadcast_to(p, (300, vocab)), u))
        assert (p[found] > 0).all()


def test_a_running_sum_that_is_rounded_in_parallel_draws_no_block_without_mass():
    """501 blocks of which most are empty: where the sum rises without mass, nothing is drawn."""
    rng = np.random.default_rng(0)
    vocab, bad = 501 * 256, 0
    for _ in range(10):
        mass = rng.exponential(size=501).astype(np.float32) ** 4
        mass[rng.random(501) < 0.5] = 0
        total = np.asarray(jnp.cumsum(jnp.asarray(mass)))
        rises = np.flatnonzero((np.diff(total) > 0) & (mass[1:] == 0))
        if not len(rises):
            continue
        p = np.zeros(vocab, np.float32)
        p[::256] = mass
        whole = mass.sum(dtype=np.float32)
        u = (total[rises] / whole)[:, None] + np.arange(-4, 5, dtype=np.float32) * 2.0**-24
        u = np.resize(np.clip(u.ravel(), 0, 1 - 2**-24), 64).astype(np.float32)
        found = np.asarray(draws(np.broadcast_to(p, (64, vocab)), u))
        bad += int((p[found] == 0).sum())
    assert bad == 0


def test_the_greatest_number_draws_the_last_token_that_has_mass():
    p = np.array([[0, 1, 0, 3, 0]], np.float32)
    assert draws(p, np.array([1 - 2**-24], np.float32)) == 3
    assert draws(p, np.array([0], np.float32)) == 1


# --- filters -----------------------------------------------------------------------------------


def slow(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """The filters as the documentation of `Sampling` defines them, one row, normalised."""
    z = logits.astype(np.float64) / s.temperature
    p = np.exp(z - z.max())
    if s.top_k:
        p[p < np.sort(p)[::-1][: s.top_k][-1]] = 0
    if s.top_p < 1:
        order = np.argsort(-p, kind="stable")
        mass, least = 0.0, 0.0
        for i in order:
            if mass >= s.top_p * p.sum():
                break
            mass, least = mass + p[i], p[i]
        p[p < least] = 0
    if s.min_p:
        p[p < s.min_p * p.max()] = 0
    return p / p.sum()


filters = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 40]),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
)


@given(st.integers(0, 2**32 - 1), filters)
@settings(max_examples=60, deadline=None)
def test_filters_are_what_they_say(seed, s):
    logits = np.random.default_rng(seed).normal(size=(3, 24)).astype(np.float32) * 2
    got = np.asarray(probabilities(jnp.asarray(logits), s))
    np.testing.assert_allclose(got.max(-1), 1)  # the likeliest stays
    for row, expected in zip(
        got / got.sum(-1, keepdims=True), (slow(x, s) for x in logits), strict=True
    ):
        np.testing.assert_array_equal(row > 0, expected > 0)
        np.testing.assert_allclose(row, expected, rtol=1e-4)


def odd_logits(seed: int, vocab: int, shape: str) -> np.ndarray:
    """Logits of three slots: random, with many ties, peaked or flat."""
    x = np.random.default_rng(seed).normal(size=(3, vocab)).astype(np.float32)
    return {"random": 3 * x, "tied": np.round(x), "peaked": 60 * x, "flat": 0 * x}[shape]


shapes = st.sampled_from(["random", "tied", "peaked", "flat"])


@given(st.integers(0, 2**32 - 1), shapes, st.integers(1, 301))
@settings(max_examples=60, deadline=None)
def test_top_k_keeps_what_a_sort_keeps(seed, shape, k):
    logits = odd_logits(seed, 300, shape)
    p = np.asarray(probabilities(logits, Sampling()))
    kept = np.asarray(probabilities(logits, Sampling(top_k=k))) > 0
    least = np.sort(p, axis=-1)[:, ::-1][:, min(k, 300) - 1, None]
    np.testing.assert_array_equal(kept, (p >= least) & (p > 0))


@given(st.integers(0, 2**32 - 1), shapes, st.floats(-6, 0))
@settings(max_examples=60, deadline=None)
def test_top_p_keeps_what_a_sort_keeps(seed, shape, exponent):
    """The kept tokens have enough mass, and without the least likely ones they do not."""
    top_p = 10.0**exponent
    logits = odd_logits(seed, 300, shape)
    everything = np.asarray(probabilities(logits, Sampling()), np.float64)
    kept = np.asarray(probabilities(logits, Sampling(top_p=top_p))) > 0
    for p, inside in zip(everything, kept, strict=True):
        least = p[inside].min()
        np.testing.assert_array_equal(inside, (p >= least) & (p > 0))
        assert p[inside].sum() >= top_p * p.sum() * (1 - 1e-5)
        assert p[p > least].sum() < top_p * p.sum() * (1 + 1e-5)


def test_no_filter_is_the_softmax():
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    p = probabilities(logits, Sampling())
    np.testing.assert_allclose(p / p.sum(-1, keepdims=True), jax.nn.softmax(logits), rtol=1e-5)


def test_top_p_keeps_the_fewest_tokens():
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32))
    for top_p, kept in ((0.49, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 4), (1.0, 4)):
        assert (probabilities(logits, Sampling(top_p=top_p)) > 0).sum() == kept


def test_ties_stay_together():
    logits = np.log(np.array([[4, 2, 2, 1, 1]], np.float32))
    assert (probabilities(logits, Sampling(top_k=2))[0] > 0).tolist() == [True] * 3 + [False] * 2
    assert (probabilities(logits, Sampling(top_p=0.5))[0] > 0).tolist() == [True] * 3 + [False] * 2
    assert (probabilities(logits, Sampling(top_p=0.39))[0] > 0).tolist() == [True] + [False] * 4


def test_more_than_the_vocabulary_and_very_cold():
    logits = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    np.testing.assert_array_equal(
        probabilities(logits, Sampling(top_k=99)), probabilities(logits, Sampling())
    )
    cold = np.asarray(probabilities(logits * 1e4, Sampling(temperature=1e-3)))
    assert np.isfinite(cold).all() and ((cold > 0).sum(-1) == 1).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
    ],
)
def test_settings_that_mean_nothing(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        Sampling(**wrong)


# --- streams -----------------------------------------------------------------------------------


def one(seed, iteration, prompt, sample, t) -> float:
    return float(uniforms(stream(seed, iteration, prompt, sample)[None], jnp.array([t]))[0])


def test_every_number_of_a_stream_counts():
    base = (1, 2, 3, 4, 5)
    seen = {one(*base)}
    for i in range(5):
        seen |= {one(*(x + d * (k == i) for k, x in enumerate(base))) for d in (1, 2, 100)}
    assert len(seen) == 16
    assert (
        len({one(*x) for x in ((1, 2, 3, 4, 5), (2, 1, 3, 4, 5), (1, 3, 2, 4, 5), (1, 2, 4, 3, 5))})
        == 4
    )


def test_a_stream_is_the_same_in_any_company():
    streams = jnp.stack([stream(7, 1, i, s) for i in range(5) for s in range(3)])
    t = jnp.arange(15) * 3
    together = np.asarray(uniforms(streams, t))
    for i in range(15):
        assert uniforms(streams[i : i + 1], t[i : i + 1])[0] == together[i]
    assert (jax.jit(stream)(7, 1, 4, 2) == streams[-1]).all()


def test_a_streams_numbers_never_change():
    """They name what was generated: another value here is another run of every experiment."""
    assert [one(42, 1, 0, 1, t) for t in range(3)] == pytest.approx(
        [0.0018448829650878906, 0.30546891689300537, 0.8415210247039795], abs=1e-9
    )


def test_numbers_are_uniform_and_unrelated():
    streams = jax.vmap(lambda i: stream(3, 1, i, 1))(jnp.arange(2000))
    u = np.stack([uniforms(streams, jnp.full(2000, t)) for t in range(4)])
    assert (u >= 0).all() and (u < 1).all()
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    apart = np.corrcoef(u) - np.eye(4)
    assert np.abs(apart).max() < 0.08
    assert abs(np.corrcoef(u[0, :-1], u[0, 1:])[0, 1]) < 0.08


# --- next tokens -------------------------------------------------------------------------------


def test_greedy_rows_take_the_likeliest_and_the_others_draw():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 30)).astype(np.float32)
    streams = jnp.stack([stream(0, 1, i, 1) for i in range(40)])
    t = jnp.arange(40)
    greedy = np.arange(40) % 2 == 0
    s = Sampling(temperature=1.3, top_p=0.8)
    got = jax.jit(partial(next_tokens, settings=s))(logits, streams, t, greedy).token
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got[greedy], logits.argmax(-1)[greedy])
    drawn = draw(probabilities(logits, s), uniforms(streams, t))
    np.testing.assert_array_equal(got[~greedy], drawn[~greedy])
    assert (np.asarray(got) != logits.argmax(-1))[~greedy].any()


# --- a filter of the user's --------------------------------------------------------------------


def drawn(logits, filter, t=3, greedy=False, **settings):
    streams = jnp.stack([stream(0, 1, i, 1) for i in range(len(logits))])
    settings = Sampling(**settings, filter=filter)
    ts, rows = jnp.full(len(logits), t), jnp.full(len(logits), greedy)
    found = jax.jit(partial(next_tokens, settings=settings))(logits, streams, ts, rows)
    return np.asarray(found.token)


LOGITS = np.random.default_rng(2).normal(size=(50, 30)).astype(np.float32)


def test_a_filter_keeps_what_it_keeps_and_its_draw():
    def odd(logits, t):
        return jnp.where(jnp.arange(logits.shape[-1]) % 2 == 1, logits, -jnp.inf)

    found = drawn(LOGITS, odd, temperature=1.5)
    assert (found % 2 == 1).all() and len(set(found)) > 8
    left = np.where(np.arange(30) % 2 == 1, LOGITS, -np.inf)
    np.testing.assert_array_equal(found, drawn(left, None, temperature=1.5))
    np.testing.assert_array_equal(drawn(LOGITS, odd, greedy=True), LOGITS.argmax(-1))
    np.testing.assert_array_equal(drawn(LOGITS, odd, top_k=1), left.argmax(-1))  # before the others


def test_a_filter_knows_how_far_the_answer_is():
    def late(logits, t):
        return jnp.where((jnp.arange(logits.shape[-1]) == 7) & (t[:, None] < 4), -jnp.inf, logits)

    sure = np.full((20, 30), -50, np.float32)
    sure[:, 7] = 0
    assert (drawn(sure, late, t=4) == 7).all() and (drawn(sure, late, t=3) != 7).all()


def test_a_filter_cannot_see_the_neighbours():
    def crowd(logits, t):
        return logits - 9 * logits.mean(axis=0, keepdims=True)

    found = drawn(LOGITS, crowd)
    for i in range(0, 50, 7):
        settings = Sampling(filter=crowd)
        streams = stream(0, 1, i, 1)[None]
        one = jnp.array([3]), jnp.array([False])
        alone = next_tokens(LOGITS[i : i + 1], streams, *one, settings=settings)
        assert alone.token[0] == found[i]


@pytest.mark.parametrize("bad", [-jnp.inf, jnp.inf, jnp.nan])
def test_where_a_filter_leaves_nothing_no_token_is_drawn(bad):
    def broken(logits, t):
        return jnp.where(logits[:, :1] > 0, bad, logits)

    found = drawn(LOGITS, broken)
    np.testing.assert_array_equal(found == NOTHING_LEFT, LOGITS[:, 0] > 0)
    assert (drawn(LOGITS, broken, greedy=True) == LOGITS.argmax(-1)).all()


def test_settings_of_a_group_become_one_value():
    rollout = Rollout(temperature=0.5, top_k=3, slots=7)
    assert Sampling.of(rollout) == Sampling(temperature=0.5, top_k=3)
    assert Sampling.of(rollout, filter=len) != Sampling.of(rollout)
