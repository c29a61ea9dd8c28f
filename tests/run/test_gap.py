"""Every iteration tells how far sampler and scorer are apart, and other weights stop the run."""

from __future__ import annotations

import math
import re
import threading
from unittest import mock

import numpy as np
import pytest
import stand_in
import tiny
from rich.console import Console
from served import no_long_waits, own_cache  # noqa: F401

from selm_jax import config
from selm_jax.iterate import iterate, run_stage
from selm_jax.preferences.examples import Example
from selm_jax.rollout import remote
from selm_jax.rollout.requests import Request
from selm_jax.run.inputs import Sampled, StoredTable
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.stages.gap import compare
from selm_jax.stages.score import score
from selm_jax.stages.stage import _Call
from selm_jax.stages.step import Step
from selm_jax.tables import examples as table
from selm_jax.tables import responses

QUIET = Console(quiet=True)
TIGHT = "rollout.gap={warn: 1e-4, stop: 1e-3}"


def gaps(run):
    return [line for t in run.iterations for line in run.folder.logged("score", t)]


def generated(run):
    for stage in ("generate", "rank", "score"):
        run_stage(run, stage, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"loss": "selm", "beta": 0.1, "alpha": 0.01}},
        pytest.param(  # in iteration 2 another model than the policy
            {"training__reference_policy": "start"}, marks=pytest.mark.slow
        ),
        pytest.param(  # has no reference
            {"objective": {"loss": "simpo", "beta": 2.0, "gamma": 0.5}}, marks=pytest.mark.slow
        ),
    ],
    ids=["previous", "start", "reference_free"],
)
def test_sampler_and_scorer_agree_in_every_iteration(tmp_path, changes):
    file = tiny.experiment(
        tmp_path, rollout__temperature=0.7, rollout__top_p=0.9, data__heldout=None, **changes
    )
    run = Run(config.load(file, [TIGHT]), QUIET)
    iterate(run)
    first, second = found = gaps(run)
    assert [line["iteration"] for line in found] == [1, 2]
    for t, line in enumerate(found, 1):
        counts = tiny.counts_of(run, "score", t)
        assert {k: v for k, v in line.items() if k.startswith("gap/")} == {
            k: v for k, v in counts.items() if k.startswith("gap/")
        }
        assert 0 <= line["gap/k3"] <= line["gap/mean"] <= line["gap/largest"] < 1e-4
        scored = sum(len(r) for e in tiny.paired(run, t)[0] for r in e.responses)
        assert line["gap/tokens"] == scored
    again = Run(config.load(file, ["rollout.gap={warn: 1, stop: 2}"]), QUIET)
    iterate(again)
    assert not again.wanted.worked, "limits do not change what was done"
    assert gaps(again) == [first, second]


@pytest.mark.slow
def test_the_gap_does_not_grow_without_learning(tmp_path):
    file = tiny.experiment(tmp_path, training__learning_rate=1e-12, data__heldout=None)
    run = Run(config.load(file, [TIGHT]), QUIET)
    iterate(run)
    first, second = gaps(run)
    assert second["gap/mean"] < 2 * first["gap/mean"] < 1e-5


def test_answers_of_other_weights_stop_the_run(serving, tmp_path):
    """The server says that it serves the policy, and has another model."""
    file = tiny.experiment(tmp_path)
    here = Run(config.load(file), QUIET)
    other = tiny.make_model(tmp_path / "other", seed=1)
    one, served = threading.Lock(), []

    def answer(body):
        params, prompt = served[0], tuple(stand_in.prompt_of(body))
        request = Request(0, prompt, 1, 0) if body["temperature"] == 0 else Request(0, prompt, 0, 1)
        with one:
            seed = body["seed"]
            (r,) = here.programs.engine.generate(params, [request], seed=seed, iteration=1)
        return 200, stand_in.vllm(list(r.tokens), r.finish, None, r.logps)

    server = serving("vllm", remote.named(here.policy(0).path), answer=answer)
    settings = [f"rollout.remote={{engine: vllm, url: '{server.url}'}}", TIGHT]

    served[:] = [here.programs.decoding(here.programs.load(here.policy(0).path))]
    right = Run(config.load(file, [f"output={tmp_path}/right", *settings]), QUIET)
    generated(right)
    assert gaps(right)[0]["gap/mean"] < 1e-5

    served[:] = [here.programs.decoding(here.programs.load(other))]
    wrong = Run(config.load(file, [f"output={tmp_path}/wrong", *settings]), QUIET)
    with pytest.raises(RunError, match=re.escape("more than rollout.gap.stop = 0.001")) as error:
        generated(wrong)
    assert "selm redo" in str(error.value) and "Check what it serves" in str(error.value)
    assert gaps(wrong)[0]["gap/mean"] > 0.05
    assert not artifacts.Stages(wrong.folder.iteration(1)).read()["score"]["done"]
    with pytest.raises(RunError, match="on average"):  # it is measured again
        iterate(wrong)
    assert len(gaps(wrong)) == 1

    lines = []
    console = Console(quiet=True)
    console.print = lambda text, **_: lines.append(text)
    told = Run(
        config.load(file, [f"output={tmp_path}/wrong", settings[0], "rollout.gap.stop=null"]),
        console,
    )
    run_stage(told, "score", 1)
    assert any("Warning: this is more than rollout.gap.warn = 0.1" in line for line in lines)


def test_answers_without_logps_have_no_gap(serving, tmp_path):
    """So had those of earlier versions, whose stages recorded no answers as an input of score."""
    file = tiny.experiment(tmp_path)
    start = Run(config.load(file), QUIET).start.path
    server = serving("vllm", remote.named(start))
    settings = f"rollout.remote={{engine: vllm, url: '{server.url}'}}"
    run = Run(config.load(file, [settings, TIGHT]), QUIET)
    generated(run)
    assert gaps(run) == []
    entry = artifacts.Stages(run.folder.iteration(1)).read()["score"]
    assert "responses" not in entry["inputs"]
    assert not any(key.startswith("gap/") for key in entry["counts"])


WEIGHTS = "training.importance={mode: token_truncate, cap: 2}"


def test_importance_weights_are_1_where_the_engine_is_the_sampler(tmp_path):
    file = tiny.experiment(tmp_path, rollout__temperature=0.7, data__heldout=None)
    run = Run(config.load(file, [WEIGHTS]), QUIET)
    generated(run)
    examples = table.read(run.folder.iteration(1) / "examples.parquet")
    assert [[len(w) for w in e.importance] for e in examples] == [
        [len(r) for r in e.responses] for e in examples
    ]
    weights = np.concatenate([w for e in examples for w in e.importance])
    np.testing.assert_allclose(weights, 1, atol=1e-4)
    (line,) = gaps(run)
    assert line["importance/ratio"] == pytest.approx(1, abs=1e-5)
    assert line["importance/outside"] == 0
    run_stage(run, "train", 1)


def test_importance_weights_need_what_the_sampler_kept(serving, tmp_path):
    file = tiny.experiment(tmp_path)
    server = serving("vllm", remote.named(Run(config.load(file), QUIET).start.path))
    run = Run(config.load(file, [f"rollout.remote={{engine: vllm, url: '{server.url}'}}", WEIGHTS]))
    with pytest.raises(RunError, match="they were not kept of any answer"):
        generated(run)


@pytest.mark.parametrize(
    ("kept", "weights"),
    [((-1.0, math.nan), (1.5, 1.0)), ((math.nan, -1.0), None), (None, None)],
    ids=["without_end", "without_another", "without_all"],
)
def test_an_end_token_that_the_server_left_out_weighs_1(tmp_path, kept, weights):
    how = {"prompt_id": "a", "sample": 0, "kind": "sample", "text": "x", "finish": "stop"}
    row = responses.Row(**how, token_ids=(5, 2), logps=kept)
    other = responses.Row(**how | {"prompt_id": "b"}, token_ids=(7, 2), logps=(-1.5, -0.5))
    responses.write(tmp_path / "responses" / "part-0.parquet", [row, other])
    sampled = Sampled(StoredTable(tmp_path, "responses"), None)
    settings = config.load(tiny.experiment(tmp_path), [WEIGHTS, "rollout.gap.stop=null"])
    step = mock.Mock(settings=settings, t=1, folder=tmp_path / "iteration_1")
    examples = [Example.of(r.prompt_id, (1,), {"chosen": r.token_ids}) for r in (row, other)]
    scored = [(np.array([math.log(1.5) - 1, -9]),), (np.array([-1.5, -0.5]),)]
    if weights is None:
        with pytest.raises(RunError, match="they were not kept of an answer to prompt a"):
            compare(step, sampled, examples, scored)
    else:
        _, found = compare(step, sampled, examples, scored)
        np.testing.assert_allclose([e.importance[0] for e in found], [weights, (1, 1)])


def test_a_gap_that_is_taken_from_another_run_is_judged_by_ones_own_limits(tmp_path):
    """Limits are not part of what members of a sweep share."""
    file, lines = tiny.experiment(tmp_path), []
    found = {"logged": [], "counts": {"gap/mean": 0.3}, "run": "another"}

    def taken(settings):
        console = Console(quiet=True)
        console.print = lambda text, **_: lines.append(text)
        run = Run(config.load(file, [settings]), console)
        step = Step.of(run, "score", 1, score.keys(run))
        return _Call(score, run, 1, {})._taken(step, found)

    assert taken("rollout.gap={warn: 0.5, stop: 0.6}") == found["counts"] and not lines
    assert taken("rollout.gap={warn: 0.2, stop: 0.6}") and "rollout.gap.warn = 0.2" in lines[0]
    with pytest.raises(RunError, match=r"more than rollout.gap.stop = 0.2"):
        taken("rollout.gap={warn: 0.1, stop: 0.2}")
