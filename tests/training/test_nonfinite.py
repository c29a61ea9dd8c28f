"""Skipped updates leave no trace, and token statistics are exact."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from selm_jax.models.decoder import Decoder, abstract_params, unembedding
from selm_jax.objectives.build import build_objective
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, place_rows, shardings
from selm_jax.preferences.examples import Example
from selm_jax.preferences.packing import Shape, pack
from selm_jax.training.loop import mean_lengths, one_update
from selm_jax.training.optimizer import optimizer
from selm_jax.training.state import TrainState
from selm_jax.training.update import PER_TOKEN, Shardings, make_update

SHAPE = Shape(rows=8, time=64, scored=64, segments=8, branches=3)
SETTINGS = {"b1": 0.9, "b2": 0.99, "eps": 1e-3, "weight_decay": 0.0}


def some_examples(seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)

    def some(low, high):
        return tuple(int(x) for x in rng.integers(0, 96, rng.integers(low, high)))

    roles = {"chosen": 0, "rejected": 1, "explore": 2}
    return [
        Example(
            f"x{i}", some(2, 7), tuple(some(1, 9) for _ in range(3)), roles, (-9.0, -7.0, -8.0)
        )
        for i in range(36)
    ]  # fmt: skip


def updated(update, state, examples, mesh=None, rate=0.003):
    """The state and metrics after an update of two microbatches."""
    batches = pack(examples, SHAPE)
    assert len(batches) == 2
    if mesh is not None:
        batches = [place_rows(batch, mesh) for batch in batches]
    return one_update(update, state, batches, rate, means=mean_lengths(examples))


def trained(decoder, params, mesh, unusable, **how):
    """The states and metrics of three updates of two microbatches; some of the updates are NaN."""
    at = shardings(abstract_params(decoder.config), mesh, TRAINING)
    objective, step = build_objective("selm", beta=0.1, alpha=0.2), optimizer("adamw", **SETTINGS)
    where = Shardings(at, NamedSharding(mesh, PartitionSpec()))
    update = make_update(decoder, objective, step, chunk=16, clip=1.0, shardings=where, **how)
    params = jax.tree.map(lambda x, s: jax.device_put(jnp.copy(x), s), params, at)
    state, found = TrainState.create(params, step), []
    for k in range(3):
        examples = some_examples(k)
        if k in unusable:
            examples[-1] = dataclasses.replace(examples[-1], reference_logps=(0.0, np.nan, 0.0))
        state, metrics = updated(update, state, examples, mesh)
        found.append((jax.tree.map(np.array, state), metrics))
    return found


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_a_skipped_update_leaves_parameters_and_moments_to_the_bit(sizes, tiny, random_params):
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(sizes))])
    decoder = Decoder(tiny(layers=1), mesh=mesh)
    params = random_params(decoder.config)
    (first, good), (second, bad), (third, after) = trained(decoder, params, mesh, {1}, skip=True)
    assert (good["skipped"], bad["skipped"], after["skipped"]) == (0, 1, 0)
    assert np.isnan(bad["loss"]) and np.isfinite(after["loss"])
    assert [int(s.step) for s in (first, second, third)] == [1, 2, 3]
    same = jax.tree.map(np.array_equal, first, second.replace(step=first.step))
    assert all(jax.tree.leaves(same))
    assert not np.array_equal(*(jax.tree.leaves(s.params)[0] for s in (second, third)))
    (plain, _), *_ = trained(decoder, params, mesh, {})
    for a, b in zip(*map(jax.tree.leaves, (plain, first)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_statistics_are_means_over_tokens_whatever_the_microbatches(tiny, random_params):
    decoder = Decoder(tiny(layers=1))
    params, step = random_params(decoder.config), optimizer("adamw", **SETTINGS)
    objective = build_objective("selm", beta=0.1, alpha=0.2)
    update, plain = (
        make_update(decoder, objective, step, chunk=16, statistics=each) for each in (True, False)
    )
    examples = some_examples()

    def after(update):
        state = TrainState.create(jax.tree.map(jnp.copy, params), step)
        return updated(update, state, examples)

    (state, metrics), (without, less) = after(update), after(plain)
    assert metrics.keys() - less.keys() == set(PER_TOKEN)
    for a, b in zip(*map(jax.tree.leaves, (state.params, without.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)

    @jax.jit
    def logits(tokens):
        at = jnp.arange(tokens.shape[1])[None]
        hidden, _ = decoder.apply({"params": params}, tokens, at, jnp.full_like(at, 16))
        return hidden.astype(jnp.float32) @ unembedding(params).astype(jnp.float32).T

    entropy, right = [], []
    for e in examples:
        for response in e.responses:
            ids = np.zeros((1, 16), int)
            whole = (*e.prompt, *response)
            ids[0, : len(whole)] = whole
            found = np.asarray(logits(ids), np.float64)[0, len(e.prompt) - 1 : len(whole) - 1]
            logp = found - np.log(np.exp(found).sum(-1, keepdims=True))
            entropy += list(-(np.exp(logp) * logp).sum(-1))
            right += list(logp.argmax(-1) == response)
    expected = np.mean(entropy), np.mean(right)
    np.testing.assert_allclose([metrics[k] for k in PER_TOKEN], expected, rtol=1e-5)
