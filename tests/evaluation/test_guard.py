"""The capability guard: of which texts, per token, and when it warns."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from selm_jax.evaluation import frontier, guard
from selm_jax.preferences.examples import Example
from selm_jax.tables import heldout, heldout_pairs


def test_of_pairs_it_is_the_chosen_answer_by_its_own_length():
    pairs = [
        Example.of("a", (1,), {"chosen": (5, 6), "rejected": (7,)}),
        Example("b", (1,), ((7,), (5, 6, 7, 8)), {"rejected": 0, "chosen": 1}),
    ]
    policy, start = [(-4.0, -9.0), (-8.0, -6.0)], [(-2.0, -1.0), (-2.0, -8.0)]
    rows = frontier.pair_rows(pairs, policy, start)
    np.testing.assert_allclose(guard.of_pairs(pairs, rows), [(-4 + 2) / 2, (-6 + 8) / 4])
    assert all(isinstance(row, heldout_pairs.Row) for row in rows)


def test_without_pairs_it_is_the_start_models_greedy_answer():
    def row(name, kind, ids, logp):
        return heldout.Row(name, "?", kind, kind == "sample", "x", ids, "stop", 0.0, logp, logp)

    first = [
        row("a", "greedy", (5, 6), -3.0), row("a", "sample", (8,), -1.0),
        row("b", "greedy", (9,), float("nan")),  # too long for a row
        row("c", "greedy", (7, 7, 7, 7), -2.0),
    ]  # fmt: skip
    prompts = [SimpleNamespace(id=name, messages=(name,)) for name in "abc"]

    def logps(examples):
        assert [(e.prompt, e.responses) for e in examples] == [
            ((ord("a"),), ((5, 6),)), ((ord("c"),), ((7, 7, 7, 7),)),
        ]  # fmt: skip
        return [(-4.0,), (-1.0,)]

    policy = SimpleNamespace(
        logps=logps, prompt_ids=lambda messages: [(ord(name),) for (name,) in messages]
    )
    np.testing.assert_allclose(guard.of_first(policy, prompts, first), [-1 / 2, 1 / 4])


@pytest.mark.parametrize(("shift", "warns"), [(-0.5, True), (-0.01, False), (0.5, False)])
def test_it_warns_where_the_whole_interval_is_below_0(shift, warns):
    values = shift + np.random.default_rng(0).normal(0, 0.2, 50)
    answer = heldout.Row("p", "?", "greedy", 0, "x", (1,), "stop", 0.0, -1.0, -1.0)
    found = frontier.summarize([answer], [answer], capability=values)
    assert found["heldout/capability"] == pytest.approx(values.mean())
    said = guard.warning(found)
    assert (said is not None) == warns
    if said is not None:
        assert f"by {-values.mean():.3f} nats per token" in said
    assert guard.warning({}) is None  # the start model itself
