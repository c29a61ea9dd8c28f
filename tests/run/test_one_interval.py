"""The same gain over the same prompts has the same interval wherever it is shown."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.evaluation import frontier, heldout
from selm_jax.iterate import iterate
from selm_jax.report import page
from selm_jax.report.data import report_data
from selm_jax.report.summary import number, paired_difference
from selm_jax.run.run import Run
from selm_jax.sweep.table import _gain, outcome
from selm_jax.tables import heldout as table


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of one iteration; its console is recorded."""
    file = tiny.experiment(
        tmp_path_factory.mktemp("run"), iterations=1, training__learning_rate=[0.1],
        evaluation__samples=1,
    )  # fmt: skip
    run = Run(config.load(file), Console(record=True, width=400))
    iterate(run)
    return run


@pytest.fixture(scope="module")
def start(done, tmp_path_factory):
    """The same run where it had evaluated the start model and nothing else."""
    folder = tmp_path_factory.mktemp("start") / "run"
    shutil.copytree(done.folder.path, folder)
    shutil.rmtree(folder / "iteration_1")
    log = folder / "metrics.jsonl"
    lines = [line for line in log.read_text().splitlines(True) if not json.loads(line)["iteration"]]
    log.write_text("".join(lines))
    return folder


def tables(run):
    return [table.read(run.folder.iteration(t) / "heldout.parquet") for t in (0, 1)]


def ends(found):
    return found.mean, found.low, found.high


def test_console_eval_run_page_and_comparison_page_say_the_same(done, start):
    (line,) = re.findall(r"iteration 1  evaluate .*", console := done.console.export_text())
    assert "iteration 0  evaluate" in console
    run, before = report_data(done.folder.path), report_data(start)
    gain = tuple(run.metric(1, f"gain{end}") for end in ("", "_low", "_high"))
    assert gain[0] and gain[1] < gain[2]

    mean, low, high = (f"{value:.3f}" for value in gain)
    assert f"gain {mean} [{low}, {high}]" in line

    seeds = {
        name: [heldout.Seed(name, "", rows, None, 0, 0)]
        for name, rows in zip(("start", "trained"), tables(done), strict=True)
    }
    found = heldout.summarize(seeds, beta=0.1)["contestants"]["trained"]["minus_first"]
    assert tuple(found["reward_greedy"][name] for name in ("mean", "low", "high")) == gain

    mean, low, high = number(gain[0], True), number(gain[1]), number(gain[2])
    assert f'{mean} <span class="range">{low} to {high}</span>' in page.render([run])

    assert ends(paired_difference(before, run)) == gain
    both = page.render([before, run])
    assert f"{mean}, 95 % interval {low} to {high}, 8 shared prompts" in both

    assert ends(_gain({0: outcome(run)})) == gain


def scored(rows, scores):
    return [
        dataclasses.replace(row, score=np.nan if score is None else score)
        for row, score in zip(rows, scores, strict=True)
    ]


@pytest.mark.parametrize("kind", ["right or wrong", "unread", "all equal", "one prompt"])
def test_the_intervals_agree_for_unusual_scores_too(done, start, kind):
    before, after = tables(done)
    rng, n = np.random.default_rng(0), len(before)
    scores = [rng.choice([0, 0.5, 1], n).tolist() for _ in range(2)]
    if kind == "unread":
        scores[0][0] = scores[1][4] = None  # two greedy answers
    if kind == "all equal":
        scores = [[0.3] * n, [0.9] * n]
    if kind == "one prompt":
        before, after, scores = before[:2], after[:2], [[0.3, 0.1], [0.9, 0.2]]
    before, after = (scored(t, s) for t, s in zip((before, after), scores, strict=True))
    logged = frontier.summarize(after, before)
    gain = tuple(logged.get(f"heldout/gain{end}") for end in ("", "_low", "_high"))

    seeds = {
        name: [heldout.Seed(name, "", rows, None, 0, 0)]
        for name, rows in (("start", before), ("trained", after))
    }
    found = heldout.summarize(seeds, beta=0.1)["contestants"]["trained"]["minus_first"]
    assert tuple(found["reward_greedy"][name] for name in ("mean", "low", "high")) == gain

    run = report_data(done.folder.path)
    fresh = [
        dataclasses.replace(a, score=np.nan if score is None else score)
        for t, given in enumerate(scores)
        for a, score in zip([a for a in run.answers if a.iteration == t], given, strict=False)
    ]
    one = dataclasses.replace(
        report_data(start), answers=tuple(a for a in fresh if not a.iteration)
    )
    other = dataclasses.replace(run, answers=tuple(fresh))
    assert ends(paired_difference(one, other)) == gain
    assert ends(_gain({0: outcome(other)})) == gain
    assert (gain[1] is None) == (kind in ("all equal", "one prompt"))
    shown = page.render([one, other])
    why = {
        "all equal": "no interval: all differences are equal",
        "one prompt": "no interval: one prompt",
    }
    assert why.get(kind, "95 % interval") in shown
