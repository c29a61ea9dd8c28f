"""Scoring: each response gets its own number, however examples are packed."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from selm_jax.preferences.examples import Example, ExampleError
from selm_jax.preferences.layouts import OneShape
from selm_jax.training.scoring import Scorer
from selm_jax.training.update import Update

# A response "costs" the sum of its ids times the parameter: what it must get is plain to see.
EXAMPLES = [
    Example(
        f"x{i}", (1,) * (1 + i % 4), tuple((10 * i + k + 1, k + 1) for k in range(1 + i % 3)), {}
    )
    for i in range(11)
]


def scorer(rows: int, row_length: int, seen: list | None = None) -> Scorer:
    def compiled(params, batch):
        if seen is not None:
            seen.append(batch.tokens.shape)
        return params * batch.sum_by_response(jnp.asarray(batch.target, jnp.float32))

    def both(params, batch):
        return compiled(params, batch), params * jnp.asarray(batch.target, jnp.float32)

    def never(*_):
        raise AssertionError("nothing is trained")

    return Scorer(
        Update(never, never, never, compiled, both, never), lambda b: b, OneShape(rows, row_length)
    )


@pytest.mark.parametrize(("rows", "row_length"), [(1, 16), (2, 24), (8, 64)])
def test_each_response_gets_its_own_number(rows, row_length):
    found = scorer(rows, row_length).logps(3.0, EXAMPLES)
    assert found == [tuple(3.0 * sum(ids) for ids in e.responses) for e in EXAMPLES]


def test_all_batches_have_one_shape_and_all_examples_are_reported():
    seen, done = [], []
    scorer(2, 16, seen).logps(1.0, EXAMPLES, lambda examples, tokens: done.append(examples))
    assert len(seen) == len(done) > 1
    assert set(seen) == {(2, 16)}
    assert sum(done) == len(EXAMPLES)


def test_rewards_are_those_of_the_compiled_rewards():
    s = scorer(2, 16)
    swapped = Scorer(s.read._replace(logps=s.read.rewards, rewards=s.read.logps), s.place, s.layout)
    assert swapped.rewards(2.0, EXAMPLES) == s.logps(2.0, EXAMPLES)


@pytest.mark.parametrize(("rows", "row_length"), [(1, 16), (2, 24), (8, 64)])
def test_each_token_gets_its_own_number(rows, row_length):
    s = scorer(rows, row_length)
    found = s.logps_by_token(2.0, EXAMPLES)
    assert [sums for sums, _ in found] == s.logps(2.0, EXAMPLES)
    for example, (_, tokens) in zip(EXAMPLES, found, strict=True):
        assert [tuple(t / 2) for t in tokens] == list(example.responses)


def test_without_examples_nothing_is_computed():
    seen = []
    assert scorer(2, 16, seen).logps(1.0, []) == [] and not seen


def test_an_example_that_fits_no_row_is_named():
    with pytest.raises(ExampleError, match="x2"):
        scorer(2, 4).logps(1.0, EXAMPLES)
