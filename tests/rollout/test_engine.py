"""The engine against full forwards: what a response says depends on its prompt and stream alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from selm_jax.models.decoder import Decoder, abstract_params
from selm_jax.models.families import read_config
from selm_jax.models.stacked import unstack
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, shardings
from selm_jax.rollout.engine import Engine, bucket
from selm_jax.rollout.filters import FilterError
from selm_jax.rollout.parameters import decoding_params
from selm_jax.rollout.requests import Request
from selm_jax.rollout.sampling import Sampling, next_tokens, stream
from selm_jax.weights.huggingface import load

SEED, ITERATION = 11, 2
STOPS = (5, 17, 60)
WARM = Sampling(temperature=1.2, top_k=60, top_p=0.97, min_p=0.01)


def some_requests(count: int = 60, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 32 tokens; greedy or not, 0 to 8 samples."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            int(i),
            tuple(int(x) for x in rng.integers(0, 96, rng.integers(1, 33))),
            greedy=int(rng.integers(2)),
            samples=int(rng.integers(9)),
        )
        for i in rng.permutation(1000)[:count]
    ]


@pytest.fixture(scope="module")
def world(tiny, random_params):
    """world(window) -> (make an engine, its parameters)"""

    @cache
    def made(window=None):
        config = tiny(window=window)
        params = decoding_params(random_params(config), jnp.float32)
        base = partial(
            Engine,
            Decoder(config, scan=False),
            WARM,
            max_prompt=32,
            max_new_tokens=12,
            stop_ids=STOPS,
        )
        return base, params

    return made


@pytest.fixture(scope="module")
def answers(world):
    """Of `some_requests`, by 16 slots; hundreds of them."""
    base, params = world()
    found = base(slots=16).generate(params, some_requests(), seed=SEED, iteration=ITERATION)
    assert len(found) > 200
    return found


def teacher_forced(all_logits, decoder, params, requests, responses, sampling):
    """The token that follows each prefix of each response, by a full forward over that prefix."""
    prompts = {r.index: r.prompt for r in requests}
    width = max(len(prompts[r.index]) + len(r.tokens) for r in responses)
    tokens = np.zeros((len(responses), width), np.int32)
    at = np.zeros((len(responses), max(len(r.tokens) for r in responses)), np.int32)
    for row, r in enumerate(responses):
        whole = (*prompts[r.index], *r.tokens)
        tokens[row, : len(whole)] = whole
        at[row] = len(prompts[r.index]) - 1 + np.arange(at.shape[1])
    logits = np.asarray(jax.jit(partial(all_logits, decoder))(params, tokens))
    streams = jnp.stack([stream(SEED, ITERATION, r.index, r.sample) for r in responses])
    greedy = np.array([r.greedy for r in responses])
    rows = np.arange(len(responses))
    draw = jax.jit(partial(next_tokens, settings=sampling))
    found = [
        draw(logits[rows, np.minimum(at[:, t], width - 1)], streams, jnp.full(len(rows), t), greedy)
        for t in range(at.shape[1])
    ]
    return [
        tuple(int(found[t].token[row]) for t in range(len(r.tokens)))
        for row, r in enumerate(responses)
    ]


# --- the same whatever the company -------------------------------------------------------------


@pytest.mark.slow_except("3-1", "16-7")
@pytest.mark.parametrize(("slots", "prefill_rows"), [(1, 4), (3, 1), (16, 7)])
def test_slots_order_and_prefill_rows_change_nothing(slots, prefill_rows, world, answers):
    base, params = world()
    requests = some_requests()
    np.random.default_rng(slots).shuffle(requests)
    if slots == 1:  # one after the other: some of them will do
        requests = requests[:20]
    engine = base(slots=slots, prefill_rows=prefill_rows)
    found = engine.generate(params, requests, seed=SEED, iteration=ITERATION)
    chosen = {r.index for r in requests}
    assert found == [r for r in answers if r.index in chosen]


def test_alone_as_in_company(world, answers):
    base, params = world()
    for request in some_requests()[:6]:
        found = base(slots=16).generate(params, [request], seed=SEED, iteration=ITERATION)
        assert found == [r for r in answers if r.index == request.index]


def test_fewer_samples_are_the_first_of_more(world, answers):
    base, params = world()
    requests = [Request(r.index, r.prompt, 0, min(r.samples, 2)) for r in some_requests()]
    found = base(slots=16).generate(params, requests, seed=SEED, iteration=ITERATION)
    wanted = {(r.index, s) for r in requests for s in range(1, r.samples + 1)}
    assert found == [r for r in answers if (r.index, r.sample) in wanted]


def test_seed_and_iteration_name_other_samples_but_not_other_greedy_answers(world, answers):
    base, params = world()
    for seed, iteration in ((SEED + 1, ITERATION), (SEED, ITERATION + 1)):
        found = base(slots=16).generate(params, some_requests(), seed=seed, iteration=iteration)
        pairs = list(zip(found, answers, strict=True))
        assert all(a.tokens == b.tokens for a, b in pairs if a.greedy)
        assert np.mean([a.tokens == b.tokens for a, b in pairs if not a.greedy]) < 0.3


@pytest.mark.slow
def test_parameters_cut_over_eight_devices_say_the_same(world, tiny, random_params, answers):
    base, _ = world()
    config = tiny()
    at = shardings(abstract_params(config), make_mesh((2, 2, 2)), TRAINING)
    spread = decoding_params(jax.tree.map(jax.device_put, random_params(config), at), jnp.float32)
    requests = some_requests()[:12]
    found = base(slots=16).generate(spread, requests, seed=SEED, iteration=ITERATION)
    chosen = {r.index for r in requests}
    assert found == [r for r in answers if r.index in chosen]


# --- the same as full forwards -----------------------------------------------------------------


@pytest.mark.slow_except("None")
@pytest.mark.parametrize("window", [None, 6])
def test_every_token_is_the_one_a_full_forward_gives(
    window, world, all_logits, random_params, answers
):
    base, params = world(window)
    requests, found = some_requests(), answers
    if window:
        found = base(slots=16).generate(params, requests, seed=SEED, iteration=ITERATION)
        assert found != answers
    decoder = base.args[0]
    expected = teacher_forced(all_logits, decoder, params, requests, found, WARM)
    assert [r.tokens for r in found] == expected


def test_greedy_is_the_argmax_of_repeated_full_forwards(world, all_logits):
    """Grown token by token, not teacher-forced."""
    base, params = world()
    requests = [Request(r.index, r.prompt, 1, 0) for r in some_requests()[:20]]
    found = base(slots=16).generate(params, requests, seed=SEED, iteration=ITERATION)
    forward = jax.jit(partial(all_logits, base.args[0]))
    rows = np.arange(len(requests))
    requests = sorted(requests, key=lambda r: r.index)
    tokens, ends = np.zeros((len(rows), 44), np.int32), np.array([len(r.prompt) for r in requests])
    for row, r in enumerate(requests):
        tokens[row, : ends[row]] = r.prompt
    grown = [[] for _ in rows]
    for t in range(12):
        new = np.asarray(forward(params, tokens))[rows, ends + t - 1].argmax(-1)
        tokens[rows, ends + t] = new
        for row in rows:
            if not (grown[row] and grown[row][-1] in STOPS):
                grown[row].append(int(new[row]))
    assert [r.tokens for r in found] == [tuple(g) for g in grown]


def test_two_tokens_have_their_frequencies(tiny, random_params, all_logits):
    """A vocabulary of 2, answers of 3 tokens: the 8 answers are as frequent as they are likely."""
    config = tiny(vocab_size=2, layers=1)
    params = decoding_params(random_params(config), jnp.float32)
    decoder = Decoder(config, scan=False)
    engine = Engine(decoder, Sampling(temperature=2.0), 64, 16, 3, stop_ids=())
    prompt, count = (0, 1, 1, 0), 3000
    found = engine.generate(params, [Request(0, prompt, 0, count)], seed=1, iteration=1)
    assert all(r.finish == "length" for r in found)
    every = list(itertools.product((0, 1), repeat=3))
    logits = all_logits(decoder, params, np.array([(*prompt, *each) for each in every]))
    logp = jax.nn.log_softmax(logits[:, 3:6] / 2.0)
    logp = np.take_along_axis(np.asarray(logp, float), np.array(every)[..., None], axis=-1)
    p = np.exp(logp[..., 0].sum(-1))
    counts = [sum(r.tokens == each for r in found) for each in every]
    assert p.max() < 0.9
    assert stats.chisquare(counts, p / p.sum() * count).pvalue > 1e-3


# --- ends --------------------------------------------------------------------------------------


def test_a_response_ends_at_its_first_stop_id_or_at_the_limit(answers):
    kinds = set()
    for r in answers:
        kinds.add(r.finish)
        assert not set(r.tokens[:-1]) & set(STOPS)
        if r.finish == "stop":
            assert r.tokens[-1] in STOPS and 1 <= len(r.tokens) <= 12
        else:
            assert r.tokens[-1] not in STOPS and len(r.tokens) == 12
    assert kinds == {"stop", "length"}
    assert {r.tokens[-1] for r in answers if r.finish == "stop"} == set(STOPS)
    assert any(len(r.tokens) == 1 for r in answers)


def test_other_stops_only_cut(world, answers):
    """The same draws without stop ids; cut at the first one they are the same responses."""
    base, params = world()
    engine = base(slots=16, stop_ids=())
    found = engine.generate(params, some_requests(), seed=SEED, iteration=ITERATION)
    for long, short in zip(found, answers, strict=True):
        assert long.finish == "length" and len(long.tokens) == 12
        assert long.tokens[: len(short.tokens)] == short.tokens


def test_answers_of_one_token(world, answers):
    base, params = world()
    engine = base(slots=16, max_new_tokens=1)
    found = engine.generate(params, some_requests(), seed=SEED, iteration=ITERATION)
    for short, long in zip(found, answers, strict=True):
        assert short.tokens == long.tokens[:1]
        assert (short.finish == "stop") == (short.tokens[-1] in STOPS)


# --- requests ----------------------------------------------------------------------------------


def test_what_is_wanted_is_what_comes(answers):
    wanted = [(r.index, s) for r in some_requests() for s in range(1 - r.greedy, r.samples + 1)]
    assert [(r.index, r.sample) for r in answers] == sorted(wanted)
    assert all(r.greedy == (r.sample == 0) for r in answers)


def test_nothing_wanted(world):
    base, params = world()
    engine = base(slots=16)
    assert engine.generate(params, [], seed=0, iteration=0) == []
    none = [Request(i, (1, 2), 0, 0) for i in range(9)]
    assert engine.generate(params, none, seed=0, iteration=0) == []


@pytest.mark.parametrize(("length", "named"), [(0, "has 0 tokens"), (33, "has 33 tokens")])
def test_a_prompt_that_does_not_fit_is_named_before_any_work(length, named, world):
    base, _ = world()
    requests = [Request(3, (1,), 1, 0), Request(77, (1,) * length, 1, 0)]
    with pytest.raises(ValueError, match=f"prompt 77 {named}; expected between 1 and 32"):
        base(slots=3).generate({}, requests, seed=0, iteration=0)


def test_the_longest_prompt_has_room_for_the_longest_answer(world, all_logits):
    base, params = world()
    engine = base(slots=16, stop_ids=())
    requests = [Request(i, (*range(i, i + 31), i), 1, 9) for i in range(4)]
    found = engine.generate(params, requests, seed=SEED, iteration=ITERATION)
    expected = teacher_forced(all_logits, engine.decoder, params, requests, found, WARM)
    assert [r.tokens for r in found] == expected


def test_progress_adds_up(world, answers):
    base, params = world()
    calls = []
    base(slots=16).generate(
        params, some_requests(), seed=SEED, iteration=ITERATION,
        progress=lambda responses, tokens: calls.append((responses, tokens)),
    )  # fmt: skip
    total = len(answers), sum(len(r.tokens) for r in answers)
    assert tuple(map(sum, zip(*calls, strict=True))) == total
    assert len(calls) > 3


def test_buckets_hold_their_lengths_in_few_sizes():
    sizes = {bucket(n) for n in range(1, 4097)}
    assert all(bucket(n) >= n for n in range(1, 4097)) and len(sizes) < 30


def test_bfloat16_answers_are_answers(world, random_params, tiny):
    config = tiny()
    params = decoding_params(random_params(config), jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    decoder = Decoder(config, jnp.bfloat16, scan=False)
    engine = Engine(decoder, WARM, 8, 32, 12, STOPS)
    found = engine.generate(params, some_requests()[:8], seed=SEED, iteration=ITERATION)
    again = engine.generate(params, some_requests()[:8], seed=SEED, iteration=ITERATION)
    assert found == again and all(0 <= t < 96 for r in found for t in r.tokens)


def test_decoding_parameters_are_the_training_ones_unstacked(tiny, random_params):
    params = random_params(tiny())
    jax.tree.map(
        np.testing.assert_array_equal, decoding_params(params, jnp.float32), unstack(params)
    )


# --- the real model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(real_model):
    """(folder, decoder, decoding parameters, prompts of the quickstart)"""
    from selm_jax.text.chat import Chat
    from selm_jax.text.prompts import Message

    file = Path(__file__).parents[2] / "experiments/data/quickstart_heldout.jsonl"
    texts = [json.loads(line)["prompt"] for line in file.read_text().splitlines()[:20]]
    chat = Chat(real_model)
    config = read_config(real_model)
    prompts = [chat.prompt_ids([Message("user", text)]) for text in texts]
    params = decoding_params(load(real_model, config), jnp.float32)
    return real_model, Decoder(config, scan=False), params, prompts, chat.stop_ids


@pytest.mark.slow
def test_the_real_model_says_what_transformers_says(real, all_logits):
    """Greedy, 24 tokens, 20 prompts; and the log-probabilities of those answers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, decoder, params, prompts, stops = real
    engine = Engine(decoder, Sampling(), 20, max(map(len, prompts)), 24, stops, prefill_rows=20)
    requests = [Request(i, p, 1, 0) for i, p in enumerate(prompts)]
    found = engine.generate(params, requests, seed=0, iteration=0)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    width = max(len(p) + 24 for p in prompts)
    tokens = np.zeros((len(prompts), width), np.int32)
    expected = []
    for row, (prompt, ours) in enumerate(zip(prompts, found, strict=True)):
        with torch.no_grad():
            ids = torch.tensor([prompt])
            said = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                eos_token_id=list(stops), pad_token_id=stops[0],
            )[0, len(prompt) :].tolist()  # fmt: skip
            assert ours.tokens == tuple(said), row
            whole = (*prompt, *said)
            tokens[row, : len(whole)] = whole
            table = torch.log_softmax(theirs(torch.tensor([whole])).logits[0], -1)
        expected.append(table[np.arange(len(prompt) - 1, len(whole) - 1), said].numpy())
    table = jax.jit(lambda p, t: jax.nn.log_softmax(all_logits(decoder, p, t)))(params, tokens)
    for row, (prompt, ours) in enumerate(zip(prompts, found, strict=True)):
        at = len(prompt) - 1 + np.arange(len(ours.tokens))
        got = np.asarray(table[row])[at, ours.tokens]
        np.testing.assert_allclose(got, expected[row], atol=1e-3)


@pytest.mark.slow
def test_the_real_model_says_the_same_in_any_company(real):
    """Order and neighbours change nothing; of other slots and prefill rows only the rounding does.

    Sums of other shapes are rounded differently, by about 1e-6 of a distribution's mass, and one of
    a few hundred draws may be that close to the border of two tokens. Which ones are depends on the
    processor. Until then both runs compute the same distributions.
    """
    _, decoder, params, prompts, stops = real
    requests = [Request(i, p, 1, 2) for i, p in enumerate(prompts[:6])]

    def run(slots, prefill_rows, requests):
        engine = Engine(decoder, Sampling(), slots, max(map(len, prompts)), 24, stops, prefill_rows)
        return engine.generate(params, requests, seed=2, iteration=1)

    one = run(16, 8, requests)
    assert run(16, 8, requests[::-1]) == one
    for other in (run(5, 2, requests), run(1, 1, requests)):
        assert sum(a != b for a, b in zip(one, other, strict=True)) <= 2
        for a, b in zip(one, other, strict=True):
            tokens = zip(a.tokens, b.tokens, strict=False)
            same = next((i for i, (x, y) in enumerate(tokens) if x != y), None)
            np.testing.assert_allclose(a.logps[:same], b.logps[:same], atol=1e-4)


# --- a filter of the user's --------------------------------------------------------------------


def crowded(logits, t):
    """Would make neighbours depend on each other, if it were shown any; early tokens are even."""
    even = jnp.arange(logits.shape[-1]) % 2 == 0
    return jnp.where(even | (t[:, None] > 2), logits - logits.mean(axis=0), -jnp.inf)


@pytest.mark.slow
def test_a_filter_leaves_answers_independent_of_slots_and_greedy_ones_alone(world, answers):
    base, params = world()
    warm = dataclasses.replace(WARM, filter=crowded)
    some = some_requests()[:12]
    found = {
        slots: dataclasses.replace(base(slots=slots), sampling=warm).generate(
            params, some, seed=SEED, iteration=ITERATION
        )
        for slots in (1, 16)
    }
    assert found[1] == found[16]
    chosen = {r.index for r in some}
    before = [r for r in answers if r.index in chosen]
    assert [r for r in found[16] if r.greedy] == [r for r in before if r.greedy] != []
    assert found[16] != before
    assert all(token % 2 == 0 for r in found[16] if not r.greedy for token in r.tokens[:3])


def test_a_filter_that_leaves_nothing_is_an_error(world):
    base, params = world()

    def nothing(logits, t):
        return jnp.where(t[:, None] < 2, logits, -jnp.inf)

    engine = dataclasses.replace(
        base(slots=4), sampling=dataclasses.replace(WARM, filter=nothing), stop_ids=()
    )
    asked = [Request(3, (1, 2, 3), 1, 0), Request(7, (1, 2), 0, 2)]
    assert engine.generate(params, asked[:1], seed=SEED, iteration=ITERATION)  # greedy
    with pytest.raises(FilterError, match=r"no token .* for sample \d of prompt 7 .* after 2"):
        engine.generate(params, asked, seed=SEED, iteration=ITERATION)
