"""A policy's answers and scores do not depend on what is batched together or what came before."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PROMPTS

from selm_jax.policy.policy import Batches, PolicyError, named_by_text, numbered
from selm_jax.preferences.examples import Example, ExampleError
from selm_jax.text.conversations import Message
from selm_jax.training import scoring


@pytest.fixture(scope="module")
def examples(build) -> list[Example]:
    rng = np.random.default_rng(0)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(int(x) for x in rng.integers(0, 256, rng.integers(1, most)))

    return [
        Example(str(i), ids(30), tuple(ids(9) for _ in range(1 + i % 3)), {}) for i in range(20)
    ]


def test_rows_change_the_last_bits_of_scores_alone(build, examples):
    fitted = build().logps(examples)
    packed = build(batches=Batches(rows=4, row_length=80)).logps(examples)
    for a, b in zip(fitted, packed, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_logps_are_sums_of_the_statistics(build, examples):
    policy = build()
    for sums, each in zip(policy.logps(examples), policy.statistics(examples), strict=True):
        assert sums == pytest.approx([float(s.logprob.sum()) for s in each], abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answering_between_changes_no_bit_of_a_score(build, examples, dtype):
    """Parameters are laid out anew to answer: where they are also rounded, the whole ones stay."""
    policy = build(dtype=jnp.dtype(dtype))
    before = policy.logps(examples)
    requests = numbered(policy.prompt_ids([[Message("user", PROMPTS[0])]]), greedy=1, samples=1)
    first = policy.answer(requests, max_new_tokens=6)
    assert (policy.weights._stacked is None) == (dtype == "float32")
    assert policy.logps(examples) == before
    assert policy.weights._apart is None
    assert policy.answer(requests, max_new_tokens=6) == first


def test_draws_are_named_by_place_or_by_text(build):
    policy = build()
    prompts = policy.prompt_ids([[Message("user", text)] for text in PROMPTS[:4]])
    how = {"greedy": 0, "samples": 2}

    def drawn(requests) -> list[list[tuple[int, ...]]]:
        found = [[] for _ in requests]
        for r in policy.answer(requests, max_new_tokens=8, seed=3):
            found[r.index].append(r.tokens)
        return found

    by_text = drawn(named_by_text(prompts, **how))
    assert drawn(named_by_text(prompts[::-1], **how))[::-1] == by_text
    by_place = drawn(numbered(prompts, **how))
    assert drawn(numbered(prompts[:2], **how)) == by_place[:2]
    assert drawn(numbered(prompts[::-1], **how))[::-1] != by_place


def test_what_does_not_fit_is_named(build, examples):
    with pytest.raises(PolicyError, match="tiny: sequence 1 may have .* reads at most 512"):
        build().logps([examples[0], Example("long", (1,) * 512, ((1, 2),), {})])
    with pytest.raises(ExampleError, match="long"):
        build(batches=Batches(rows=1, row_length=64)).logps(
            [Example("long", (1,) * 70, ((1,),), {})]
        )
    with pytest.raises(PolicyError, match="sequence 0"):
        build().answer(numbered([(1,) * 500], greedy=1, samples=0), max_new_tokens=20)


def test_two_models_of_one_shape_share_their_programs(build, examples, monkeypatch):
    seen = set()
    compiled = scoring.Scorer._scored

    def spied(self, function, *rest):
        seen.add(function)
        return compiled(self, function, *rest)

    monkeypatch.setattr(scoring.Scorer, "_scored", spied)
    build().logps(examples[:2])
    build().logps(examples[:2])
    assert len(seen) == 1
