"""The commands as in README.md, on a finished run: which defaults they take from it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from rich.console import Console
from typer.testing import CliRunner

from selm_jax import config
from selm_jax.evaluation.command import app
from selm_jax.iterate import iterate
from selm_jax.run.run import Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two iterations, with settings that are no verb's defaults."""
    file = tiny.experiment(tmp_path_factory.mktemp("command"))
    with pytest.MonkeyPatch.context() as patch:
        tiny.on_first_device(patch)
        settings = ["objective.beta=0.3", "feedback.settings={target: 20}"]
        done = Run(config.load(file, settings), Console(quiet=True))
        iterate(done)
    return done


@pytest.fixture
def selm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> str:
        told = CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(a) for a in arguments])
        assert told.exit_code == 0, (told.output, told.exception)
        return " ".join(told.output.split())

    return call


def greedy_scores(run: Run, t: int) -> np.ndarray:
    rows = pq.read_table(run.folder.iteration(t) / "heldout.parquet").to_pylist()
    return np.array([row["score"] for row in rows if row["kind"] == "greedy"])


def test_heldout_takes_everything_from_the_run(run, selm, tmp_path):
    told = selm("heldout", run.folder.path, "--dry-run")
    assert "nothing was computed" in told and not list(tmp_path.iterdir())
    selm("heldout", run.folder.path)
    report = json.loads((tmp_path / "evaluations/heldout/heldout.json").read_text())
    assert (report["prompts"], report["beta"], report["asked"]["limit"]) == (8, 0.3, 12)
    assert (report["reference"], report["ranker"]) == ("run/start", "length")
    (found,) = report["contestants"].values()
    assert found["models"] == ["run/iteration_2"]
    # The greedy answers are those that the run has seen, and so are their scores.
    reward = found["measures"]["reward_greedy"]["mean"]
    assert reward == pytest.approx(greedy_scores(run, 2).mean())


def test_winrate_of_the_last_model_and_its_start(run, selm, tmp_path):
    sources = [run.folder.path, f"start={run.policy(0).path}"]
    told = selm("winrate", *sources, "--dry-run")
    assert "nothing was computed" in told and not list(tmp_path.iterdir())
    selm("winrate", *sources)
    report = json.loads((tmp_path / "evaluations/winrate/winrate.json").read_text())
    last, start = greedy_scores(run, 2), greedy_scores(run, 0)
    wins = np.where(last > start, 1.0, np.where(last == start, 0.5, 0.0))
    (pair,) = report["pairs"]
    assert pair["win_rate"]["mean"] == pytest.approx(wins.mean())
    assert report["ranker"] == "length"


def test_lm_eval_of_the_last_model(run, selm, tmp_path):
    pytest.importorskip("lm_eval", reason="the harness is not installed: selm_jax[lm-eval]")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"text": f"{verb} a river in one line."} for verb in ("Describe", "Praise", "Sell")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "local_river.yaml").write_text(
        f"""
task: local_river
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "rows.jsonl"}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
    )
    asked = ["lm_eval", run.folder.path, "--tasks", "local_river", "--include", folder]
    assert "nothing was computed" in selm(*asked, "--dry-run")
    selm(*asked, "--no-chat")
    file = tmp_path / "evaluations/run--iteration_2/lm_eval/results.json"
    assert json.loads(file.read_text())["selm"]["tasks"][0]["task"] == "local_river"
