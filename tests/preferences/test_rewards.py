"""Rewards from packed trees are those of each conversation by itself; so are the gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selm_jax.models.config import Mixture, ScalarHead
from selm_jax.models.decoder import Decoder, rewards, unembedding
from selm_jax.objectives.build import build_objective
from selm_jax.objectives.roles import ROLES
from selm_jax.preferences.examples import Example
from selm_jax.preferences.packing import Shape, common_shape, pack, unpack
from selm_jax.preferences.rewards import response_rewards, split
from selm_jax.training.state import TrainState
from selm_jax.training.update import make_update

SHAPE = Shape(rows=4, time=48, scored=48, segments=4, branches=3)


def some_examples(count: int = 9, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)

    def some(low, high):
        return tuple(int(x) for x in rng.integers(0, 96, rng.integers(low, high)))

    return [
        Example(
            f"x{i}", some(2, 7), tuple(some(1, 9) for _ in range(rng.integers(2, 4))),
            {"chosen": 0, "rejected": 1}, scores=None,
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def world(tiny, random_params):
    decoder = Decoder(tiny(head=ScalarHead(), tied=True))
    return decoder, random_params(decoder.config)


def alone(decoder, params, conversations) -> jax.Array:
    """The reward of each conversation in a row by itself, followed by junk. [conversations]"""
    rows, time = len(conversations), 16
    tokens = np.random.default_rng(9).integers(0, 96, (rows, time)).astype(np.int32)
    for row, ids in enumerate(conversations):
        tokens[row, : len(ids)] = ids
    positions = jnp.broadcast_to(jnp.arange(time), (rows, time))
    hidden, _ = decoder.apply({"params": params}, tokens, positions)
    last = jnp.array([len(ids) - 1 for ids in conversations])
    return rewards(params, hidden[jnp.arange(rows), last])


def test_packed_rewards_are_those_of_each_conversation_alone(world):
    decoder, params = world
    examples = some_examples()
    packed = jax.jit(lambda p, batch: response_rewards(decoder, p, batch))
    found = unpack(examples, SHAPE, [packed(params, batch) for batch in pack(examples, SHAPE)])
    own = alone(decoder, params, [(*e.prompt, *ids) for e in examples for ids in e.responses])
    assert np.std(own) > 0.1
    np.testing.assert_allclose(np.concatenate(found), own, atol=1e-5)


def test_the_gradient_of_packed_rows_is_that_of_each_conversation_alone(world):
    decoder, params = world
    examples = [
        Example(e.prompt_id, e.prompt, e.responses, e.roles, scores=tuple(range(len(e.responses))))
        for e in some_examples(6, seed=1)
    ]
    settings = {"margin": 0.3, "centering": 0.05, "label_smoothing": 0.1}
    update = make_update(
        decoder, build_objective("bradley_terry", **settings), optax.sgd(1.0), chunk=16
    )
    means = np.ones(len(ROLES), np.float32)
    batches = pack(examples, SHAPE)
    gradients, sums = update.gradients(params, batches[0], means)
    for batch in batches[1:]:
        gradients, sums = update.add(gradients, sums, params, batch, means)

    def slow(p):
        whole = [(*e.prompt, *e.responses[e.roles[x]]) for e in examples for x in ROLES[:2]]
        chosen, rejected = alone(decoder, p, whole).reshape(6, 2).T
        d = chosen - rejected - 0.3 * (0.0 - 1.0)
        smoothed = -0.9 * jax.nn.log_sigmoid(d) - 0.1 * jax.nn.log_sigmoid(-d)
        return jnp.sum(smoothed + 0.05 * (chosen + rejected) ** 2)

    loss, expected = jax.jit(jax.value_and_grad(slow))(params)
    np.testing.assert_allclose(sums["loss"], loss, rtol=1e-5)
    assert float(sums["examples"]) == 6
    assert float(optax.tree.norm(expected)) > 0.1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, expected
    )


def test_the_load_of_a_reward_models_experts_is_that_of_the_tokens_it_reads(tiny, random_params):
    config = tiny(layers=2, mixture=Mixture(4, 2, True), head=ScalarHead(), tied=True)
    step = optax.sgd(1.0)
    update = make_update(
        Decoder(config), build_objective("bradley_terry"), step, chunk=16, train_router=False
    )
    examples, means = some_examples(5, seed=3), np.ones(len(ROLES), np.float32)
    params = random_params(config)
    (batch, *more) = pack(examples, SHAPE)
    gradients, sums = update.gradients(params, batch, means)
    tokens = int(np.sum(batch.segment > 0))
    for batch in more:
        gradients, sums = update.add(gradients, sums, params, batch, means)
        tokens += int(np.sum(batch.segment > 0))
    np.testing.assert_array_equal(sums["_loads"].sum(-1), [2 * tokens] * 2)
    state = TrainState(0, jax.tree.map(jnp.copy, params), step.init(params))
    _, metrics = update.apply(state, gradients, sums, 1e-2)
    assert 1 <= metrics["experts/load_max"] <= 4 and 0 <= metrics["experts/unused"] < 1


def test_the_last_token_of_each_response_is_found_wherever_it_lies():
    examples = some_examples(12, seed=2)
    (batch, *_) = pack(examples, common_shape([examples], rows=12, time=48))
    found = np.asarray(batch.last_of_response())
    for r, s, k in np.ndindex(found.shape):
        own = (batch.segment[r] == s + 1) & (batch.branch[r] == k + 1)
        assert found[r, s, k] == (np.flatnonzero(own)[-1] if own.any() else -1)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=8), min_size=1, max_size=4))
def test_what_conversations_have_in_common_is_said_once(lists):
    whole = [tuple(ids) for ids in lists]
    before, rests = split(whole)
    assert [(*before, *rest) for rest in rests] == whole
    assert all(rests)  # what is read last stands in each branch
    longer = {ids[: len(before) + 1] for ids in whole}
    assert len(longer) > 1 or len(before) == min(map(len, whole)) - 1


@pytest.mark.parametrize("pad", [None, 0, 7])
@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(0, 2), min_size=1, max_size=8))
def test_the_score_is_read_where_transformers_reads_it(pad, ids):
    read = ScalarHead(pad).read(tuple(ids))
    if pad is None:
        at = len(ids) - 1
    else:  # (token_indices * non_pad_mask).argmax(-1)
        at = int((np.arange(len(ids)) * (np.array(ids) != pad)).argmax())
    assert read == tuple(ids[: at + 1])


def test_a_reward_model_has_no_logits(world):
    _, params = world
    assert "unembedding" not in params
    with pytest.raises(ValueError, match="reward model"):
        unembedding(params)
