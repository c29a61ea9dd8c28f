"""A cache that grows and shrinks: answers are those of full forwards, and no step leaves it."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selm_jax.models.decoder import Decoder
from selm_jax.parallel.mesh import decode_mesh, make_mesh
from selm_jax.rollout import schedule
from selm_jax.rollout import slots as module
from selm_jax.rollout.engine import Engine
from selm_jax.rollout.parameters import decoding_params, decoding_shardings
from selm_jax.rollout.requests import Request
from selm_jax.rollout.sampling import Sampling, next_tokens, stream
from selm_jax.rollout.schedule import Board, bucket, capacities

WARM = Sampling(temperature=1.2, top_p=0.97, min_p=0.01)
PROMPT, ANSWER = 48, 40


@given(st.integers(1, 9000), st.integers(1, 5000))
def test_capacities_are_few_and_a_step_reads_at_most_twice_what_it_must(prompt, answer):
    sizes = capacities(prompt, answer)
    greatest = bucket(prompt) + answer
    assert sizes[-1] == greatest and len(sizes) <= 1 + max(0, np.log2(greatest / 128))
    assert all(a < b <= 2 * a for a, b in itertools.pairwise(sizes))
    assert sizes[0] <= 256


@given(st.data(), st.integers(1, 600), st.integers(1, 300))
def test_no_slot_runs_past_the_capacity_and_each_call_gets_on(data, longest, answer):
    board = Board(4, 1, longest, answer)
    for slot in data.draw(st.sets(st.integers(0, 3), min_size=1)):
        board.put(slot, (slot, 0), data.draw(st.integers(1, longest)))
    while board.busy:
        capacity = board.capacity
        steps = board.steps(capacity)
        assert steps > 0
        for slot in board.busy:
            ran = min(steps, answer - board.drawn[slot])
            # The last token drawn is not written, and the first is drawn before any step.
            assert board.prompt[slot] + board.drawn[slot] - 1 + ran <= capacity
            board.drawn[slot] += ran
            if board.drawn[slot] == answer or data.draw(st.booleans()):
                board.owner[slot] = None


@pytest.fixture
def small_sizes(monkeypatch):
    """Sizes of 32, 48 and 88 tokens, of which a decoding call takes the least that it needs."""
    monkeypatch.setattr(schedule, "_LEAST", 16)
    monkeypatch.setattr(schedule, "_AHEAD", 3)
    assert capacities(PROMPT, ANSWER) == (32, 48, 88)


@pytest.fixture(scope="module")
def requests():
    """Long and short prompts, of which each has a greedy answer or samples, or both."""
    rng = np.random.default_rng(1)
    lengths = [48, 47, 33, 20, 5, 1, *rng.integers(1, 49, 12)]
    return [
        Request(i, tuple(map(int, rng.integers(0, 96, n))), i % 2, 1 + i % 3)
        for i, n in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def on(tiny, random_params):
    """on(devices, tensor) -> (engine, its parameters)"""
    config = tiny(tied=True)

    def make(devices, tensor):
        mesh = decode_mesh(make_mesh((1, devices, 1), jax.devices()[:devices]), tensor)
        params = decoding_params(
            random_params(config), jnp.float32, decoding_shardings(config, mesh)
        )
        engine = Engine.fitted(
            decoder=Decoder(config, scan=False), sampling=WARM, slots=6, max_prompt=PROMPT,
            max_new_tokens=ANSWER, stop_ids=(5, 17), prefill_rows=3, mesh=mesh,
        )  # fmt: skip
        return engine, params

    return make


@pytest.fixture(scope="module")
def expected(on, all_logits, requests):
    """The answers of each request alone, drawn token by token from full forwards."""
    engine, params = on(1, 1)
    wanted = [(r, sample) for r in requests for sample in r.wanted()]
    streams = jnp.stack([stream(3, 1, r.index, sample) for r, sample in wanted])
    greedy = np.array([sample == 0 for _, sample in wanted])
    ends = np.array([len(r.prompt) for r, _ in wanted])
    rows = np.arange(len(wanted))
    tokens = np.zeros((len(wanted), PROMPT + ANSWER), np.int32)
    for row, (r, _) in enumerate(wanted):
        tokens[row, : ends[row]] = r.prompt

    @jax.jit
    def following(tokens, t):
        logits = all_logits(engine.decoder, params, tokens)[rows, ends + t - 1]
        return next_tokens(logits, streams, jnp.full(len(rows), t), greedy, WARM).token

    for t in range(ANSWER):
        tokens[rows, ends + t] = following(tokens, t)
    answers = {}
    for row, (r, sample) in enumerate(wanted):
        answer = tokens[row, ends[row] : ends[row] + ANSWER].tolist()
        stops = [t for t, token in enumerate(answer) if token in engine.stop_ids]
        answers[r.index, sample] = tuple(answer[: stops[0] + 1] if stops else answer)
    assert any(len(answer) == ANSWER for answer in answers.values())
    return answers


@pytest.mark.slow_except("False-8-2", "True")
@pytest.mark.parametrize(("devices", "tensor"), [(1, 1), (8, 1), (8, 2)])
@pytest.mark.parametrize("look", [False, True])
def test_answers_do_not_depend_on_growing_and_shrinking(
    devices, tensor, look, on, requests, expected, small_sizes, monkeypatch
):
    engine, params = on(devices, tensor)
    used = []

    def decode(engine, params, slots, *rest):
        used.append(slots.capacity)
        return real(engine, params, slots, *rest)

    real = module.decode
    monkeypatch.setattr("selm_jax.rollout.engine.decode", decode)
    ended = (lambda tokens: False) if look else None
    found = engine.generate(params, requests, seed=3, iteration=1, ended=ended)
    assert {(r.index, r.sample): r.tokens for r in found} == expected
    changes = np.diff(used)
    assert (changes > 0).any() and (changes < 0).any()


def test_a_resized_cache_holds_the_same_tokens_and_the_old_one_is_gone(on):
    engine, _ = on(8, 2)
    rng = np.random.default_rng(0)
    old = module.empty(engine, 48)
    old = old.replace(
        cache=jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape), x.dtype), old.cache)
    )
    before = jax.device_get(old.cache)
    large = module.resized(engine, old, 88)
    assert all(x.is_deleted() for x in jax.tree.leaves(old.cache))
    for x, was in zip(jax.tree.leaves(large.cache), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(x[:, :, :48], was)
        assert not x[:, :, 48:].any()
    where = module.slot_places(engine, large).cache
    assert all(
        x.sharding.is_equivalent_to(at, x.ndim)
        for x, at in zip(jax.tree.leaves(large.cache), jax.tree.leaves(where), strict=True)
    )
    small = module.resized(engine, large, 32)
    for x, was in zip(jax.tree.leaves(small.cache), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(x, was[:, :, :32])


@pytest.mark.slow
def test_the_kernels_for_tpus_give_the_same_answers(on, requests, expected):
    engine, params = on(8, 2)
    decoder = engine.decoder.clone(back_end="kernel", mesh=engine.mesh)
    engine = dataclasses.replace(engine, decoder=decoder)
    found = engine.generate(params, requests, seed=3, iteration=1)
    assert {(r.index, r.sample): r.tokens for r in found} == expected
