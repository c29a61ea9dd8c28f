"""Which prompts are asked about: the functions by hand, and the rank stage on a tiny model."""

import copy
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from selm_jax import config
from selm_jax.feedback.ranker import FeedbackError
from selm_jax.iterate import iterate
from selm_jax.models.decoder import Decoder
from selm_jax.preferences.acquisition import (
    Prospect,
    best,
    d_optimal,
    entropy,
    reward_gap,
    widest,
)
from selm_jax.preferences.examples import Example
from selm_jax.run.run import Run
from selm_jax.weights.huggingface import load

logps = st.lists(st.floats(-200, 0), min_size=1, max_size=5)


def prospect(policy, reference=None, drawn=None):
    policy = np.array(policy, float)
    reference = policy if reference is None else np.array(reference, float)
    return Prospect(policy, reference, np.array([True] * len(policy) if drawn is None else drawn))


@given(st.lists(st.tuples(st.floats(-200, 0), st.floats(-200, 0)), min_size=1, max_size=5))
def test_reward_gap_is_the_largest_difference_of_a_pair(both):
    policy, reference = zip(*both, strict=True)
    ratio = [p - r for p, r in both]
    slow = max(abs(a - b) for a in ratio for b in ratio)
    assert reward_gap(prospect(policy, reference)) == pytest.approx(slow)
    assert reward_gap(prospect(policy)) == 0


def test_entropy_is_that_of_the_draws():
    assert entropy(prospect([-2, -4, -100], drawn=[True, True, False])) == 3
    assert entropy(prospect([-2, -4], drawn=[False, False])) == 3
    # Of a uniform distribution over 8 responses it is log 8, whatever is drawn.
    assert entropy(prospect([-np.log(8)] * 3)) == pytest.approx(np.log(8))


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_design_is_greedy_in_the_determinant(scale):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 5)) * rng.uniform(0.1, 3, size=(12, 1))
    x[7] = x[11] + 1e-3  # the same direction twice teaches less
    information, slow = np.mean(x * x) * np.eye(5), []
    for _ in range(6):
        worth = [
            -np.inf if i in slow else np.linalg.slogdet(information + np.outer(v, v))[1]
            for i, v in enumerate(x)
        ]
        slow.append(int(np.argmax(worth)))
        information += np.outer(x[slow[-1]], x[slow[-1]])
        found = d_optimal(scale * x, len(slow), np.random.default_rng(1))
        assert found.tolist() == sorted(slow)
    longest = np.argsort((x * x).sum(axis=1))[-3:]
    assert {7, 11} <= set(longest) and len({7, 11} & set(slow[:3])) == 1


def test_a_design_takes_the_two_answers_that_differ_most():
    features = [np.array([0.0, 0.0]), np.array([1.0, 0.0]), np.array([-1.0, 2.0])]
    np.testing.assert_array_equal(np.abs(widest(features)), [2, 2])
    assert widest(features[:1]).tolist() == [0, 0]
    equal = [d_optimal(np.zeros((5, 3)), 2, np.random.default_rng(i)) for i in range(500)]
    assert all(150 < count < 250 for count in np.bincount(np.concatenate(equal)))
    assert d_optimal(np.eye(3), 9, np.random.default_rng(0)).tolist() == [0, 1, 2]
    with pytest.raises(FeedbackError, match="no candidate with token ids"):
        widest([])
    with pytest.raises(FeedbackError, match="not finite"):
        d_optimal(np.array([[np.nan]]), 1, np.random.default_rng(0))


@given(st.lists(st.integers(-3, 3), max_size=12), st.integers(1, 15), st.integers(0, 9))
def test_the_best_are_asked(values, budget, seed):
    found = best(values, budget, np.random.default_rng(seed)).tolist()
    assert found == sorted(set(found)) and len(found) == min(budget, len(values))
    rest = [v for i, v in enumerate(values) if i not in found]
    assert not rest or min(values[i] for i in found) >= max(rest)


def test_equal_values_are_a_fair_draw():
    drawn = [best(np.zeros(5), 2, np.random.default_rng(i)) for i in range(500)]
    assert all(150 < count < 250 for count in np.bincount(np.concatenate(drawn)))  # 200, sd 11


def test_refusals():
    with pytest.raises(FeedbackError, match="finite"):
        prospect([-1, np.nan])
    with pytest.raises(FeedbackError, match="one finite number of each"):
        prospect([-1, -2], drawn=[True])
    with pytest.raises(FeedbackError, match="budget is 0"):
        best([1.0], 0, np.random.default_rng(0))
    with pytest.raises(FeedbackError, match="finite"):
        best([np.inf], 1, np.random.default_rng(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two iterations that asks about 5 of 8 prompts."""
    file = tiny.experiment(
        tmp_path_factory.mktemp("run"), data__heldout=None, data__limit=8,
        training__global_batch=2, training__checkpoint_every=100,
        feedback={"ranker": "length", "budget": 5, "acquisition": "reward_gap",
                  "labels": {"flip": 0.5}},
    )  # fmt: skip
    run = Run(config.load(file), Console(quiet=True))
    iterate(run)
    return run


def asked(run, t, acquisition="random"):
    """The prompts that another acquisition would ask about in the same run."""
    feedback = dataclasses.replace(run.experiment.feedback, acquisition=acquisition)
    other = copy.copy(run)
    other.experiment = dataclasses.replace(run.experiment, feedback=feedback)
    return tiny.pool(other, t)


@pytest.mark.slow
@pytest.mark.parametrize("t", [1, 2])
def test_a_budget_in_a_run(run, t):
    counts = json.loads((run.folder.iteration(t) / "stage.json").read_text())["rank"]["counts"]
    assert counts["prompts"] == 8 and counts["asked"] == counts["scored"] == 5
    assert counts["drops/not_asked"] == 3 and counts["asked/candidates"] == 15
    assert counts["acquisition/forward_tokens"] > 0
    rows = pq.read_table(run.folder.iteration(t) / "ranked.parquet").to_pylist()
    silent = {row["prompt_id"] for row in rows if row["dropped"] == "not_asked"}
    assert len(silent) == 3
    for row in rows:
        assert (row["score"] is None) == (row["prompt_id"] in silent)
        assert row["preference"] == (0.5 if row["chosen"] else None)
    against = sum(row["chosen"] and row["rank"] != 1 for row in rows)
    assert counts["label_against_scores"] == against > 0


@pytest.mark.slow
def test_what_is_asked_is_what_the_acquisition_values_most(run):
    gap, again, by_entropy = (asked(run, 2, name) for name in ("reward_gap",) * 2 + ("entropy",))
    assert gap.asked == again.asked
    rows = pq.read_table(run.folder.iteration(2) / "ranked.parquet").to_pylist()
    was = {row["prompt_id"] for row in rows if row["dropped"] != "not_asked"}
    assert {gap.prompts[i].id for i in gap.asked} == was
    # The oracle: each candidate alone, as an example of its own.
    values = {"reward_gap": [], "entropy": []}
    for i, each in enumerate(gap.candidates):
        ids = [
            Example("x", run.chat.prompt_ids(gap.prompts[i].messages), (c.token_ids,), {})
            for c in each
        ]
        policy, reference = (
            np.array(tiny.logps_of(run, run.programs.load(run.policy(t).path), ids))[:, 0]
            for t in (1, 0)
        )
        values["reward_gap"].append(np.ptp(policy - reference))
        values["entropy"].append(-policy[[c.source == "sample" for c in each]].mean())
    for pool, name in ((gap, "reward_gap"), (by_entropy, "entropy")):
        assert sorted(np.argsort(values[name])[-5:].tolist()) == list(pool.asked)


@pytest.mark.slow
def test_a_design_in_a_run_reads_the_last_layer_at_the_end_of_each_answer(run):
    pool = asked(run, 2, "d_optimal")
    assert len(pool.asked) == 5 and pool.cost["acquisition/forward_tokens"] > 0
    policy = run.programs.policy(run.policy(1).path, run.chat)
    config = run.programs.config
    params, decoder = load(run.policy(1).path, config), Decoder(config, scan=True)
    example = Example.of("x", (5, 6, 7), {"chosen": (8, 9), "rejected": (10,)})
    (found,) = policy.features([example])
    for answer, feature in zip(example.responses, found, strict=True):
        ids = jnp.array([[*example.prompt, *answer]])
        hidden, _ = decoder.apply({"params": params}, ids, jnp.arange(ids.shape[1])[None])
        np.testing.assert_allclose(feature, hidden[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_in_the_first_iteration_there_is_no_gap(run):
    assert asked(run, 1, "reward_gap").asked == asked(run, 1).asked
    once, twice = (asked(run, t, "reward_gap").cost["acquisition/forward_tokens"] for t in (1, 2))
    assert twice > 1.5 * once
    assert "acquisition/forward_tokens" not in asked(run, 2).cost


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("budget=0", "feedback.budget: 0"),
        ("acquisition=entropy", "it has no effect without feedback.budget"),
        ("labels.flip=0.7", "feedback.labels.flip: 0.7"),
        ("labels.temperature=0", "feedback.labels.temperature"),
        ("labels.filp=0.1", "feedback.labels.filp: unknown key; did you mean 'flip'"),
    ],
)
def test_settings(tmp_path, setting, what):
    file = tmp_path / "e.yaml"
    file.write_text(
        "{output: x, iterations: 1, model: {source: m}, data: {train: t}, objective: {loss: dpo}, "
        "training: {learning_rate: 1e-3, global_batch: 4}, "
        "candidates: {samples: 2, dataset: false}}"
    )
    with pytest.raises(config.ConfigError, match=what):
        config.load(file, [f"feedback.{setting}"])
