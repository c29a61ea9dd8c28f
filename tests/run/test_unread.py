"""Malformed answers of a judge in a run become no number, no tie and no pair."""

import json
import re
import shutil

import pyarrow.parquet as pq
import pytest
import tiny
from rich.console import Console
from scripted_judge import Judge

from selm_jax import config
from selm_jax.feedback.judge.unread import UnreadableJudge
from selm_jax.iterate import run_stage
from selm_jax.report import page
from selm_jax.report.data import report_data
from selm_jax.report.summary import paragraph
from selm_jax.run.run import Run

PROSE = "It is fine, I think."


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """An experiment of one iteration whose answers are there."""
    file = tiny.experiment(
        tmp_path_factory.mktemp("answered"), iterations=1, data__limit=6, data__heldout_limit=4,
        training__learning_rate=[1e-3], evaluation__samples=1,
    )  # fmt: skip
    run = Run(config.load(file), Console(quiet=True))
    run.open()
    run_stage(run, "generate", 1)
    return file


@pytest.fixture
def judge():
    with Judge() as judge:
        yield judge


@pytest.fixture
def judged(answered, judge, tmp_path):
    """judged(form, *overrides) -> the run, with this judge; its console is recorded."""
    template = tmp_path / "template.txt"

    def make(form, *overrides):
        folder = tmp_path / "run"
        if not folder.exists():
            shutil.copytree(answered.parent / "run", folder)
        shown = "{response}" if form == "pointwise" else "{response_a}<<>>{response_b}"
        template.write_text("{prompt}<<>>" + shown)
        settings = {
            "model": "m", "form": form, "base_url": judge.url, "template": str(template),
            "cache": str(tmp_path / "cache.sqlite"), "concurrency": 1, "retries": 0,
        }  # fmt: skip
        overrides = (f"output={folder}", "feedback.ranker=judge", *overrides)
        given = [*overrides, f"feedback.settings={json.dumps(settings)}"]
        return Run(config.load(answered, given), Console(record=True, width=300))

    return make


def about(prompts):
    """Prose about these prompts, something readable about the others."""
    return lambda body: (
        PROSE if any(p in body["messages"][-1]["content"] for p in prompts) else "[[7]] [[A]]"
    )


def counts(run, t, stage):
    return json.loads((run.folder.iteration(t) / "stage.json").read_text())[stage]["counts"]


def test_ranking_counts_an_unreadable_prompt_as_such_and_not_as_a_tie(judged, judge):
    run = judged("pointwise", "feedback.prompts_per_part=4")
    prompts = [p.messages[-1].content for p in run.prompts(1)]
    judge.says = lambda body: (
        "Hm." if prompts[0] in (text := body["messages"][-1]["content"])
        else f"[[{1 + len(text.split('<<>>')[1]) % 9}.5]]"
    )  # fmt: skip
    run_stage(run, "rank", 1)
    found = counts(run, 1, "rank")
    rows = pq.read_table(run.folder.iteration(1) / "ranked.parquet").to_pylist()
    texts = {row["text"] for row in rows if row["prompt"] == prompts[0]}
    assert found["drops/malformed"] == 1 and found["malformed"] == len(texts)
    assert found["pairs"] + found["drops"] == found["scored"] == found["prompts"] == 6
    line = run.console.export_text()
    assert f"{len(texts)} malformed" in line
    for row in pq.read_table(run.folder.iteration(1) / "ranked.parquet").to_pylist():
        gone = row["prompt"] == prompts[0]
        assert (row["score"] is None) == (row["rank"] is None) == gone
        assert not gone or (row["dropped"] == "malformed" and not row["chosen"])


@pytest.mark.parametrize("form", ["pointwise", "pairwise"])
def test_ranking_stops_where_most_is_unreadable_and_goes_on_when_mended(judged, judge, form):
    """Too few questions for the early stop: 18 ratings. It ended as "0 examples" in training."""
    judge.says = lambda body: PROSE
    run = judged(form, "feedback.prompts_per_part=2")
    with pytest.raises(UnreadableJudge, match=f"could not be read.*{PROSE}.*template"):
        run_stage(run, "rank", 1)
    assert not (run.folder.iteration(1) / "scores").exists()
    judge.says = about([])
    again = judged(form, "feedback.prompts_per_part=2")
    run_stage(again, "rank", 1)
    found = counts(again, 1, "rank")
    assert found["malformed"] == found["drops/malformed"] == 0 and found["scored"] == 6


def test_an_early_stop_keeps_no_part(judged, judge):
    judge.says = lambda body: PROSE
    run = judged("pairwise", "feedback.prompts_per_part=1")
    with pytest.raises(UnreadableJudge, match=r"20 of the first \d+ answers"):
        run_stage(run, "rank", 1)
    assert 20 <= len(judge.bodies) <= 22 and not (run.folder.iteration(1) / "scores").exists()


@pytest.mark.parametrize("form", ["pointwise", "pairwise"])
def test_held_out_rewards_are_over_what_was_read(judged, judge, form):
    run = judged(form)
    texts = [p.messages[-1].content for p in run.heldout]
    judge.says = about(texts[:1])
    run_stage(run, "evaluate", 0)
    rows = pq.read_table(run.folder.iteration(0) / "heldout.parquet").to_pylist()
    for row in rows:
        assert (row["score"] is None) == (row["prompt"] == texts[0] and row["score"] != 0.5)
    unread = sum(row["score"] is None for row in rows)
    line = json.loads(run.folder.metrics_file.read_text().splitlines()[-1])
    worth = 7.0 if form == "pointwise" else 0.5
    assert line["heldout/reward_greedy"] == worth
    assert line["heldout/unread"] == unread > 0
    assert counts(run, 0, "evaluate")["malformed"] > 0
    told = run.console.export_text()
    assert re.search(r"evaluate .*[1-9] malformed", told)
    text = page.render([report_data(run.folder.path)])
    assert f"{unread} judgements not readable" in text and "<b>not readable</b>" in text


def test_without_any_known_reward_the_report_has_a_word_and_no_number(judged, judge):
    """Every greedy answer unreadable, every other one not: no mean of anything."""
    run = judged("pointwise", "evaluation.samples=3")
    calls = iter(range(10**6))
    judge.says = lambda body: PROSE if next(calls) % 4 == 0 else "[[7]]"
    run_stage(run, "evaluate", 0)
    rows = pq.read_table(run.folder.iteration(0) / "heldout.parquet").to_pylist()
    if len({(r["prompt"], r["text"]) for r in rows}) == len(rows):
        assert all((r["score"] is None) == (r["kind"] == "greedy") for r in rows)
    text = run.folder.metrics_file.read_text()
    assert "NaN" not in text
    line = json.loads(text.splitlines()[-1])
    assert line["heldout/reward_greedy"] is None
    assert line["heldout/gain"] is None if "heldout/gain" in line else True
    assert "reward_greedy not readable" in run.console.export_text()
    data = report_data(run.folder.path)
    assert "could not be read" in paragraph(data)
    assert "<td>not readable</td>" in page.render([data])


@pytest.mark.parametrize("form", ["pointwise", "pairwise"])
def test_a_held_out_evaluation_of_nothing_readable_stops(judged, judge, form):
    judge.says = lambda body: PROSE
    run = judged(form)
    with pytest.raises(UnreadableJudge, match="8 of the first 8|could not be read"):
        run_stage(run, "evaluate", 0)
    assert (
        not run.folder.metrics_file.exists()
        and not (run.folder.iteration(0) / "heldout.parquet").exists()
    )
