"""The settings of the ablations on the whole loop: exploring answers, reference, and ranking."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.iterate import iterate
from selm_jax.run.run import Run
from selm_jax.tables.examples import read as read_examples

QUIET = Console(quiet=True)


def go(file, *overrides) -> Run:
    run = Run(config.load(file, overrides), QUIET)
    iterate(run)
    return run


def lines_of(run: Run) -> list[dict]:
    found = map(json.loads, run.folder.metrics_file.read_text().splitlines())
    return [line for line in found if line["stage"] == "train"]


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    """Two iterations against the start model; all answers explore."""
    file = tiny.experiment(tmp_path_factory.mktemp("fixed"))
    return go(file, "training.reference_policy=start", "feedback.explore=all")


@pytest.mark.slow
def test_all_of_the_policys_answers_explore(fixed):
    ranked = pq.read_table(fixed.folder.iteration(1) / "ranked.parquet").to_pylist()
    drawn: dict[str, list[tuple[int, ...]]] = {}
    for row in ranked:
        assert row["explore"] == (row["dropped"] is None)
        drawn.setdefault(row["prompt_id"], []).append(tuple(row["token_ids"]))
    examples = read_examples(fixed.folder.iteration(1) / "examples.parquet")
    assert examples
    for e in examples:
        assert [e.responses[i] for i in e.explored] == drawn[e.prompt_id]
        assert e.responses[e.roles["explore"]] == drawn[e.prompt_id][0]


@pytest.mark.slow
def test_a_fixed_reference_is_the_start_model_in_every_iteration(fixed):
    params = fixed.programs.load(fixed.policy(0).path)
    for t in (1, 2):
        examples = read_examples(fixed.folder.iteration(t) / "examples.parquet")
        for e, again in zip(examples, tiny.logps_of(fixed, params, examples), strict=True):
            np.testing.assert_allclose(e.reference_logps, again, rtol=1e-6, atol=1e-5)
    first = {m["iteration"]: m for m in lines_of(fixed) if m["step"] == 1}
    assert first[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first[2]["optimism/reward"]) > 1e-4  # the policy has left it already
    assert first[2]["loss"] != pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_a_live_fixed_reference_gives_the_same_numbers(fixed, tmp_path):
    live = go(
        fixed.folder.path / "config.yaml", f"output={tmp_path / 'live'}", "training.reference=live"
    )
    ours, theirs = lines_of(live), lines_of(fixed)
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["optimism/reward"] == pytest.approx(b["optimism/reward"], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_stepwise_dpo_moves_the_reference_and_keeps_the_data(tmp_path):
    file = tiny.experiment(tmp_path)
    rows = [
        {"prompt_id": f"p{i}", "prompt": p, "chosen": f"A {i}", "rejected": f"Nothing of {i}."}
        for i, p in enumerate(tiny.PROMPTS[:16])
    ]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = go(
        file,
        f"data.train={tmp_path / 'prefs.jsonl'}",
        "data.chosen=chosen",
        "data.rejected=rejected",
        "data.skip=4",
        "candidates={greedy: 0, samples: 0, dataset: true}",
        "objective={loss: dpo, beta: 0.1}",
    )
    seen = []
    for t in (1, 2):
        examples = read_examples(run.folder.iteration(t) / "examples.parquet")
        seen += [e.prompt_id for e in examples]
        params = run.programs.load(run.policy(t - 1).path)
        for e, again in zip(examples, tiny.logps_of(run, params, examples), strict=True):
            np.testing.assert_allclose(e.reference_logps, again, rtol=1e-6, atol=1e-5)
            text = {role: run.chat.text(e.responses[i]) for role, i in e.roles.items()}
            assert text == {role: rows[int(e.prompt_id[1:])][role] for role in text}
        counts = json.loads((run.folder.iteration(t) / "stage.json").read_text())["generate"][
            "counts"
        ]
        assert counts["responses"] == 0
    assert seen == [
        f"p{i}" for i in range(4, 16)
    ]  # the first four are skipped, the rest cut in two
    assert [m["loss"] for m in lines_of(run) if m["step"] == 1] == pytest.approx(
        [math.log(2)] * 2, abs=1e-6
    )
