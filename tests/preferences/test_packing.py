"""Packed prompt trees say the same as every prompt + response alone: values, gradients, padding."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selm_jax.models.attention import Sight
from selm_jax.models.decoder import Decoder
from selm_jax.objectives.build import build_objective
from selm_jax.objectives.losses import Logps, Objective
from selm_jax.objectives.roles import ROLES
from selm_jax.preferences.examples import Example, ExampleError
from selm_jax.preferences.packing import (
    Shape,
    assign_rows,
    common_shape,
    pack,
    unpack,
    unpack_tokens,
)
from selm_jax.training.update import loss_sums, response_logps

VOCAB = 96
SHAPE = Shape(rows=2, time=40, scored=40, segments=16, branches=4)
MOST, LONGEST = 24, 20  # responses in a test, tokens of prompt + response

OBJECTIVES = {
    "dpo": {"loss": "dpo", "beta": 0.3},
    "cdpo": {"loss": "cdpo", "beta": 0.3, "label_smoothing": 0.2},
    "robust": {"loss": "robust", "beta": 0.3, "label_smoothing": 0.2},
    "ipo per token": {"loss": "ipo", "beta": 0.3},
    "ipo": {"loss": "ipo", "beta": 0.3, "length_normalized": False},
    "hinge": {"loss": "hinge", "beta": 0.3},
    "simpo": {"loss": "simpo", "beta": 2.0, "gamma": 0.5},
    "sft": {"loss": "sft"},
    "selm": {"loss": "selm", "beta": 0.3, "alpha": 0.5},
    "selm, alpha": {"loss": "selm", "beta": 0.3, "alpha": 0.5, "convention": "alpha"},
    "xpo": {"loss": "xpo", "beta": 0.3, "alpha": 0.5},
    "ipo+optimism": {"loss": "ipo+optimism", "beta": 0.3, "alpha": 0.5},
}


def objective(name: str):
    return build_objective(
        OBJECTIVES[name]["loss"], **{k: v for k, v in OBJECTIVES[name].items() if k != "loss"}
    )


def numbered(number) -> Objective:
    """The objective with a number that is known only when the program runs.

    So one program serves all objectives: the model's forward and backward pass is compiled once.
    """
    functions = [lambda batch, name=name: objective(name)(batch)[0] for name in OBJECTIVES]
    return Objective(ROLES, lambda batch: (jax.lax.switch(number, functions, batch), {}))


ids = st.integers(0, VOCAB - 1)


@st.composite
def examples(draw, most: int = 6) -> list[Example]:
    """Up to `most` examples of 1 to 4 responses; any response may play any number of roles."""
    found = []
    for i in range(draw(st.integers(1, most))):
        prompt = draw(st.lists(ids, min_size=1, max_size=10))
        responses = draw(st.lists(st.lists(ids, min_size=1, max_size=7), min_size=1, max_size=4))
        roles = {role: draw(st.integers(0, len(responses) - 1)) for role in ROLES}
        reference = tuple(draw(st.floats(-30, 0, width=32)) for _ in responses)
        found.append(
            Example(f"x{i}", tuple(prompt), tuple(map(tuple, responses)), roles, reference)
        )
    return found


def random_examples(seed: int, count: int) -> list[Example]:
    """Prompts of 1 to 10 tokens with 3 roles over 2 or 3 responses of 1 to 7 tokens."""
    rng = np.random.default_rng(seed)

    def some(n):
        return tuple(int(x) for x in rng.integers(0, VOCAB, n))

    found = []
    for i in range(count):
        n = int(rng.integers(2, 4))
        roles = {"chosen": 0, "rejected": 1, "explore": int(rng.integers(0, n))}
        prompt = some(rng.integers(1, 11))
        responses = tuple(some(rng.integers(1, 8)) for _ in range(n))
        reference = tuple(rng.uniform(-30, 0, n).astype(np.float32))
        found.append(Example(f"x{i}", prompt, responses, roles, reference))
    return found


# --- packing as such --------------------------------------------------------------------------


@given(examples())
@settings(max_examples=100, deadline=None)
def test_every_example_stands_whole_in_exactly_one_row(found):
    rows = assign_rows(found, SHAPE.time)
    assert sorted(i for row in rows for i in row) == list(range(len(found)))
    batches = pack(found, SHAPE)
    seen = []
    for batch in batches:
        for r in range(SHAPE.rows):
            for s in range(int(batch.segment[r].max())):
                mine = batch.segment[r] == s + 1
                parts = [
                    tuple(batch.tokens[r][mine & (batch.branch[r] == k)].tolist())
                    for k in range(int(batch.branch[r][mine].max()) + 1)
                ]
                seen.append((parts[0], tuple(parts[1:])))
    assert sorted(seen) == sorted((e.prompt, e.responses) for e in found)
    used = sum(int((b.segment > 0).sum()) for b in batches)
    assert used == sum(e.tokens for e in found)
    assert sum(float(b.weight.sum()) for b in batches) == len(found)


@given(examples())
@settings(max_examples=100, deadline=None)
def test_unpack_undoes_pack(found):
    batches = pack(found, SHAPE)
    assert unpack(found, SHAPE, [b.reference for b in batches]) == [
        e.reference_logps for e in found
    ]


@given(examples())
@settings(max_examples=100, deadline=None)
def test_positions_predictors_and_owners(found):
    for batch in pack(found, SHAPE):
        for r in range(SHAPE.rows):
            scored = batch.owner[r] < SHAPE.segments * SHAPE.branches
            assert scored.sum() == (batch.branch[r] > 0).sum()
            for target, at, owner in zip(
                batch.target[r][scored], batch.predictor[r][scored], batch.owner[r][scored],
                strict=True,
            ):  # fmt: skip
                segment, branch = owner // SHAPE.branches + 1, owner % SHAPE.branches + 1
                assert batch.segment[r, at] == segment
                assert batch.branch[r, at] in (0, branch)
                follows = (
                    (batch.segment[r] == segment)
                    & (batch.branch[r] == branch)
                    & (batch.position[r] == batch.position[r, at] + 1)
                )
                assert batch.tokens[r][follows].tolist() == [target]


def tree_mask(segment, branch) -> np.ndarray:
    """Who sees whom, the slow obvious form: causally, one's own segment's prompt and own branch."""
    at = np.arange(segment.shape[1])
    same_segment = segment[:, :, None] == segment[:, None, :]
    own_path = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    return (at[:, None] >= at) & same_segment & own_path & (segment[:, :, None] > 0)


@given(examples())
@settings(max_examples=200, deadline=None)
def test_one_integer_per_key_is_the_whole_mask(found):
    at = np.arange(SHAPE.time)
    for batch in pack(found, SHAPE):
        expected = tree_mask(batch.segment, batch.branch)
        seen = (at <= at[:, None]) & (at[:, None] < batch.end[:, None, :])
        np.testing.assert_array_equal(seen, expected)
        sight = Sight(batch.position, batch.position, batch.end)
        np.testing.assert_array_equal(sight.mask(), expected)
        ago = batch.position[:, :, None] - batch.position[:, None, :]
        near = sight._replace(window=jnp.int32(3)).mask()
        np.testing.assert_array_equal(near, expected & (ago < 3))


@given(examples())
@settings(max_examples=50, deadline=None)
def test_the_mask_is_the_path_of_each_token(found):
    for batch in pack(found, SHAPE):
        mask = np.asarray(Sight(batch.position, batch.position, batch.end).mask())
        for r in range(SHAPE.rows):
            for t in np.flatnonzero(batch.segment[r]):
                path = [
                    s
                    for s in range(SHAPE.time)
                    if batch.segment[r, s] == batch.segment[r, t]
                    and batch.branch[r, s] in (0, batch.branch[r, t])
                    and batch.position[r, s] <= batch.position[r, t]
                ]
                assert np.flatnonzero(mask[r, t]).tolist() == path


def test_a_tree_of_depth_three_is_masked_by_the_same_integer(tiny, random_params):
    """A prompt, two beginnings and two ends of each, depth first: each path is as if alone."""
    rng = np.random.default_rng(0)
    #         prompt, a,  a's ends, b,  b's ends
    parents = (None, 0, 1, 1, 0, 4, 4)
    lengths = (5, 3, 4, 2, 1, 3, 3)
    starts = np.cumsum([0, *lengths])
    paths = [[n] if p is None else None for n, p in enumerate(parents)]
    for n, parent in enumerate(parents[1:], start=1):
        paths[n] = [*paths[parent], n]
    time = int(starts[-1]) + 2  # the last two are padding
    tokens = rng.integers(0, VOCAB, (1, time)).astype(np.int32)
    position, end = np.zeros((2, 1, time), np.int32)
    places = [np.arange(starts[n], starts[n + 1]) for n in range(len(parents))]
    for n, path in enumerate(paths):
        before = sum(lengths[i] for i in path[:-1])
        position[0, places[n]] = before + np.arange(lengths[n])
        below = [i for i, other in enumerate(paths) if n in other]
        end[0, places[n]] = starts[max(below) + 1]

    decoder = Decoder(tiny(window=9))
    variables = {"params": random_params(decoder.config)}
    run = jax.jit(lambda *row: decoder.apply(variables, *row)[0])
    packed = run(tokens, position, end)
    for path in paths:
        own = np.concatenate([places[n] for n in path])
        alone = run(tokens[:, own], np.arange(len(own))[None])
        np.testing.assert_allclose(packed[:, own], alone, rtol=1e-5, atol=2e-5)


def test_an_example_too_long_is_named_with_its_sizes():
    long = Example("the-long-one", (1,) * 30, ((2,) * 6, (3,) * 5), {"chosen": 0, "rejected": 1})
    with pytest.raises(ExampleError, match=r"the-long-one.*30 tokens.*6, 5.*41 tokens.*has 40"):
        pack([Example("ok", (1,), ((2,),), {}), long], SHAPE)
    assert len(pack([dataclasses.replace(long, prompt=(1,) * 29)], SHAPE)) == 1


@pytest.mark.parametrize("less", [{"scored": 4}, {"segments": 1}, {"branches": 1}])
def test_a_shape_that_is_too_small_is_refused(less):
    found = [Example(f"x{i}", (1, 2), ((3, 4, 5), (6, 7)), {}) for i in range(2)]
    with pytest.raises(ValueError, match="common_shape"):
        pack(found, dataclasses.replace(SHAPE, **less))


@given(st.lists(examples(), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_the_common_shape_fits_every_group(groups):
    shape = common_shape(groups, rows=3, time=SHAPE.time)
    for group in groups:
        assert unpack(group, shape, [b.reference for b in pack(group, shape)]) == [
            e.reference_logps for e in group
        ]


def test_rows_are_filled():
    found = random_examples(3, 60)
    rows = assign_rows(found, 64)
    assert sum(e.tokens for e in found) / (64 * len(rows)) > 0.9


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": ()},
        {"responses": ()},
        {"responses": ((1,), ())},
        {"roles": {"chosen": 2}},
        {"roles": {"best": 0}},
        {"reference_logps": (0.5,)},
    ],
)
def test_an_example_that_cannot_be_trained_on_is_named(wrong):
    right = {"prompt": (1,), "responses": ((2,), (3,)), "roles": {"chosen": 1}}
    Example("fine", **right)
    with pytest.raises(ExampleError, match="example bad"):
        Example("bad", **right | wrong)


# --- the same values --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tiny, random_params, alone_logps, spread):
    """(packed log-probabilities, those of each response alone), as tuples per example."""

    @cache
    def compiled(window):
        decoder = Decoder(tiny(window=window))
        packed = jax.jit(lambda params, batch: response_logps(decoder, params, batch, chunk=16))
        alone = jax.jit(partial(alone_logps, decoder))
        return random_params(decoder.config), packed, alone

    def both(found, window):
        params, packed, alone = compiled(window)
        got = unpack(found, SHAPE, [np.asarray(packed(params, b)) for b in pack(found, SHAPE)])
        flat = iter(np.asarray(alone(params, *spread(found, MOST, LONGEST))))
        return got, [tuple(next(flat) for _ in e.responses) for e in found]

    return both


@pytest.mark.parametrize("window", [None, 4])
def test_packed_log_probabilities_are_those_of_each_response_alone(world, window):
    @given(examples())
    @settings(max_examples=40, deadline=None)
    def check(found):
        for got, alone in zip(*world(found, window), strict=True):
            np.testing.assert_allclose(got, alone, rtol=1e-5, atol=2e-5)

    check()


@given(examples())
@settings(max_examples=100, deadline=None)
def test_shared_tokens_are_those_within_the_shorter_answers_length(found):
    """Whichever responses play the roles; the packed form against each response by itself."""
    batches = pack(found, SHAPE)
    packed = unpack_tokens(found, SHAPE, [np.asarray(batch.shared()) for batch in batches])
    for example, of_responses in zip(found, packed, strict=True):
        pair = [example.responses[example.roles[role]] for role in ("chosen", "rejected")]
        assert example.shared == min(map(len, pair))
        for ids, within in zip(example.responses, of_responses, strict=True):
            assert within.tolist() == [i < min(map(len, pair)) for i in range(len(ids))]
    for batch in batches:
        assert not np.asarray(batch.shared())[batch.owner == SHAPE.segments * SHAPE.branches].any()


# --- the same gradients -----------------------------------------------------------------------


def slow_loss(which, alone, params, rows, played, reference, weight):
    """Sum of the loss over examples, every response of every role in a row of its own.

    played [examples, roles] says which row plays which role; weight is 0 for examples that are not.
    """
    tokens, starts, stops = rows
    logps, lengths = alone(params, tokens, starts, stops), (stops - starts).astype(jnp.float32)

    def by_role(x):
        return {role: x[played[:, i]] for i, role in enumerate(ROLES)}

    means = {k: (weight * n).sum() / weight.sum() for k, n in by_role(lengths).items()}
    losses, _ = which(Logps(by_role(logps), by_role(reference), by_role(lengths), means))
    return (weight * losses).sum()


@pytest.fixture(scope="module", params=[None, 4], ids=["full", "window"])
def gradients(request, tiny, random_params, alone_logps):
    """Two compiled functions of an objective's number to (loss, gradient): packed, and slow."""
    decoder = Decoder(tiny(window=request.param, layers=1))
    params = random_params(decoder.config)

    @jax.jit
    @jax.value_and_grad
    def packed(params, number, batch, means):
        which = numbered(number)
        sums = partial(loss_sums, decoder=decoder, objective=which, chunk=16)
        return sums(params, batch, means)[0]

    @jax.jit
    @jax.value_and_grad
    def slow(params, number, *args):
        return slow_loss(numbered(number), partial(alone_logps, decoder), params, *args)

    return partial(packed, params), partial(slow, params)


def test_gradients_of_every_objective_are_those_of_the_slow_path(gradients, spread):
    packed, slow = gradients

    @given(examples())
    @settings(max_examples=10, deadline=None)
    def check(found):
        first = np.cumsum([0, *(len(e.responses) for e in found)])  # row of an example's first
        played = np.zeros((6, len(ROLES)), np.int32)
        for i, e in enumerate(found):
            played[i] = [first[i] + e.roles[role] for role in ROLES]
        reference = np.zeros(MOST, np.float32)
        reference[: first[-1]] = [x for e in found for x in e.reference_logps]
        weight = (np.arange(6) < len(found)).astype(np.float32)
        rows = spread(found, MOST, LONGEST)
        means = np.float32([np.mean([len(e.responses[e.roles[r]]) for e in found]) for r in ROLES])
        for number, name in enumerate(OBJECTIVES):
            slow_value, slow_grads = slow(number, rows, played, reference, weight)
            each = [packed(number, batch, means) for batch in pack(found, SHAPE)]
            loss, grads = jax.tree.map(lambda *x: sum(x), *each)
            np.testing.assert_allclose(loss, slow_value, rtol=2e-5, atol=2e-5, err_msg=name)
            size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slow_grads))
            jax.tree.map(
                lambda x, y, name=name, size=size: np.testing.assert_allclose(
                    x, y, rtol=1e-4, atol=2e-5 * max(size, 1), err_msg=name
                ),
                grads,
                slow_grads,
            )

    check()


def test_padding_content_never_matters(tiny, random_params):
    decoder = Decoder(tiny())
    params = random_params(decoder.config)
    (batch, *_) = pack(random_examples(1, 5), SHAPE)
    rng = np.random.default_rng(0)
    pad, idle = batch.segment == 0, batch.owner == SHAPE.segments * SHAPE.branches
    assert pad.any() and idle.any()

    def junk(x, where, high):
        return np.where(where, rng.integers(0, high, x.shape), x).astype(np.int32)

    other = batch.replace(
        tokens=junk(batch.tokens, pad, VOCAB),
        branch=junk(batch.branch, pad, 4),
        position=junk(batch.position, pad, SHAPE.time),
        target=junk(batch.target, idle, VOCAB),
        predictor=junk(batch.predictor, idle, SHAPE.time),
        roles=np.where(batch.weight[..., None, None] == 0, 7, batch.roles).astype(np.float32),
        reference=np.where(batch.weight[..., None] == 0, 7, batch.reference).astype(np.float32),
    )

    @jax.jit
    @jax.value_and_grad
    def loss(params, batch):
        means = np.ones(len(ROLES), np.float32)
        selm = objective("selm")
        return loss_sums(params, batch, means, decoder=decoder, objective=selm, chunk=16)[0]

    (a, grad_a), (b, grad_b) = loss(params, batch), loss(params, other)
    assert a == b
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), grad_a, grad_b)


def test_sums_are_float32_whatever_the_computation(tiny, random_params):
    config = tiny(layers=1)
    (batch, *_) = pack(random_examples(1, 5), SHAPE)

    def logps(dtype):
        decoder = Decoder(config, dtype)
        return jax.jit(lambda p, b: response_logps(decoder, p, b, 16))(random_params(config), batch)

    half, exact = logps(jnp.bfloat16), logps(jnp.float32)
    assert half.dtype == exact.dtype == jnp.float32
    assert 0 < np.abs(half - exact).max() < 0.05 * np.abs(exact).max()
