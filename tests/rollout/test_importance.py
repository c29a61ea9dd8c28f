"""Importance weights follow their formulas, and the update multiplies gradients by them."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.config import Importance
from selm_jax.models.decoder import Decoder
from selm_jax.objectives.build import build_objective
from selm_jax.preferences.examples import Example, ExampleError
from selm_jax.preferences.packing import Shape, pack
from selm_jax.rollout.importance import metrics_of, weights_of
from selm_jax.training.loop import mean_lengths
from selm_jax.training.update import loss_sums, scored_logps, with_gradients_times

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
SHAPE = Shape(rows=4, time=48, scored=48, segments=4, branches=3)


def oracle(how, of_responses):
    """The weights by their definition, one token at a time."""
    logs = [d for of_response in of_responses for d in of_response]
    found = []
    for of_response in of_responses:
        for d in of_response:
            rho = math.exp(d if "token" in how.mode else sum(logs))
            if "truncate" in how.mode:
                found.append(min(how.cap, rho))
            else:
                found.append(rho if how.floor <= rho <= how.cap else 0.0)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0])
def test_weights_are_those_of_the_definition(mode, scale):
    how = Importance(mode=mode, cap=2.0, floor=0.5 if "mask" in mode else 0.0)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        differences = [rng.normal(0, scale, n) for n in rng.integers(1, 6, 3)]
        found = weights_of(how, differences, [True] * 3)
        assert [len(w) for w in found.weights] == [len(d) for d in differences]
        expected = oracle(how, differences)
        np.testing.assert_allclose(np.concatenate(found.weights), expected, rtol=1e-12)
        if not scale:
            assert metrics_of([found]) == {"importance/ratio": 1, "importance/outside": 0}
    far = weights_of(how, [np.array([900.0, 900.0])], [True])
    assert far.outside.all() and np.isfinite(np.concatenate(far.weights)).all()


@pytest.mark.parametrize("mode", MODES)
def test_ratios_are_reported_of_the_policys_answers_alone(mode):
    how = Importance(mode=mode, cap=2.0)
    own, given = np.log([4.0]), np.zeros(9)
    mixed = weights_of(how, [own, given], [True, False])
    alone = weights_of(how, [given], [False])
    assert metrics_of([mixed, alone]) == {
        "importance/ratio": pytest.approx(4), "importance/outside": 1
    }  # fmt: skip


def some_examples(weighted: bool, count: int = 12):
    rng = np.random.default_rng(5)

    def some(low, high):
        return tuple(int(x) for x in rng.integers(0, 96, rng.integers(low, high)))

    for i in range(count):
        responses = tuple(some(1, 9) for _ in range(3))
        example = Example(
            f"x{i}", some(2, 7), responses, {"chosen": 0, "rejected": 1, "explore": 2},
            tuple(rng.uniform(-30, -5, 3)),
        )  # fmt: skip
        weights = tuple(tuple(rng.uniform(0, 2, len(r))) for r in responses)
        yield dataclasses.replace(example, importance=weights) if weighted else example


@pytest.fixture(scope="module")
def world(tiny, random_params):
    decoder = Decoder(tiny(layers=1))
    objective = build_objective("selm", beta=0.1, alpha=0.5)

    @jax.jit
    def gradients(params, batch, means):
        def loss(p):
            how = {"decoder": decoder, "objective": objective, "chunk": 16}
            return loss_sums(p, batch, means, **how)

        (_, sums), found = jax.value_and_grad(loss, has_aux=True)(params)
        return found, sums

    return decoder, random_params(decoder.config), gradients


def summed(world, examples, shape=SHAPE):
    _, params, gradients = world
    means = mean_lengths(examples)
    parts = [gradients(params, batch, means) for batch in pack(examples, shape)]
    return jax.tree.map(lambda *xs: sum(map(np.asarray, xs)), *parts), len(parts)


def assert_close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol), a, b)


def test_weights_of_1_and_of_whole_pairs_are_weights_of_the_loss(world):
    plain = list(some_examples(weighted=False))
    (without, sums), parts = summed(world, plain)
    assert parts > 1

    def times(factors):
        return [
            dataclasses.replace(e, importance=tuple((f,) * len(r) for r in e.responses))
            for e, f in zip(plain, factors, strict=True)
        ]

    (ones, same), _ = summed(world, times([1.0] * 12))
    assert_close((ones, same), (without, sums), atol=0)
    factors = [0.0, 0.5, 2.0] * 4
    (found, metrics), _ = summed(world, times(factors))
    assert_close(
        metrics, sums, atol=0
    )  # values are not weighted, so the loss still starts at log 2
    alone = [summed(world, [e])[0][0] for e in plain]
    expected = jax.tree.map(lambda *gs: sum(f * g for f, g in zip(factors, gs)), *alone)  # noqa: B905
    assert_close(found, expected)


def test_weights_travel_with_the_example_whatever_the_packing(world):
    examples = list(some_examples(weighted=True))
    one, many = Shape(12, 48, 48, 4, 3), Shape(2, 32, 32, 2, 3)
    (first, _), parts = summed(world, examples)
    for shape in (one, many):
        (other, _), other_parts = summed(world, examples[::-1], shape)
        assert other_parts != parts
        assert_close(other, first)
    mixed = [dataclasses.replace(examples[0], importance=None), *examples[1:]]
    ones = tuple((1.0,) * len(r) for r in examples[0].responses)
    same = [dataclasses.replace(examples[0], importance=ones), *examples[1:]]
    assert_close(summed(world, mixed)[0], summed(world, same)[0], atol=0)


def test_the_gradient_is_a_finite_difference_of_each_tokens_weighted_change(world):
    """Along a direction, a token's log-probability moves by its weight times its own change."""
    decoder, params, gradients = world
    examples = list(some_examples(weighted=True, count=3))
    (batch,), means = pack(examples, SHAPE), mean_lengths(examples)
    objective = build_objective("selm", beta=0.1, alpha=0.5)
    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(params)))
    tree = jax.tree.structure(params)
    direction = jax.tree.map(
        lambda k, p: jax.random.normal(k, p.shape), jax.tree.unflatten(tree, list(keys)), params
    )
    logps = jax.jit(lambda p: scored_logps(decoder, p, batch, 16))

    def loss(moved):
        """In float64, from the moved log-probabilities of the tokens."""
        total = 0.0
        at = np.asarray(logps(params), np.float64)
        values = at + batch.importance * (moved - at)
        for r, s in zip(*np.nonzero(batch.weight)):  # noqa: B905
            sums = [values[r][batch.owner[r] == s * SHAPE.branches + k].sum() for k in range(3)]
            won, lost, explored = sums - np.asarray(batch.reference[r, s], np.float64)
            total += np.log1p(np.exp(-0.1 * (won - lost))) + 0.5 * 0.1 * explored
        return total

    step = 3e-3
    ends = [
        np.asarray(logps(jax.tree.map(lambda p, v, h=h: p + h * v, params, direction)), np.float64)
        for h in (step, -step)
    ]
    measured = (loss(ends[0]) - loss(ends[1])) / (2 * step)
    found, sums = gradients(params, batch, means)
    computed = sum(
        jax.tree.leaves(jax.tree.map(lambda g, v: float(jnp.sum(g * v)), found, direction))
    )
    assert loss(np.asarray(logps(params))) == pytest.approx(float(sums["loss"]), rel=1e-4)
    assert computed == pytest.approx(measured, rel=2e-2) and objective.terms


def test_a_weight_changes_a_gradient_and_never_a_value():
    values, weights = jnp.array([-3.0, -0.1]), jnp.array([0.0, 2.5])
    found, back = jax.vjp(lambda v: with_gradients_times(weights, v), values)
    np.testing.assert_array_equal(found, values)
    np.testing.assert_allclose(back(jnp.ones(2))[0], weights)


def test_each_token_needs_its_weight():
    example = next(some_examples(weighted=True))
    with pytest.raises(ExampleError, match="importance weights"):
        dataclasses.replace(example, importance=((1.0,),) * 3)
