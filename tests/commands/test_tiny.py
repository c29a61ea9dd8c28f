"""A rehearsal of an experiment with a ranker of the user's."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.commands import tiny as command
from selm_jax.commands.tiny import shrink
from selm_jax.iterate import iterate
from selm_jax.parallel import multihost
from selm_jax.run.run import Run
from selm_jax.shell import artifacts

QUIET = Console(quiet=True)
CODE = """
def score(prompt, response, row):
    return 1.0 if "a word that random letters do not spell" in response else 0.0
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """An experiment whose ranker gives all random letters the same score."""
    (tmp_path / "ranker_of_mine.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    sys.modules.pop("ranker_of_mine", None)
    tiny.on_first_device(monkeypatch)
    file = tiny.experiment(
        tmp_path, feedback={"ranker": "ranker_of_mine:score"}, model={"source": "smollm"},
        iterations=1, training__learning_rate=1e-3,
    )  # fmt: skip
    return config.load(file)


def test_the_ranker_stays_and_ties_are_kept(mine):
    feedback = shrink(mine, QUIET).feedback
    assert (feedback.ranker, feedback.ties) == ("ranker_of_mine:score", "first")


def test_a_ranker_of_ours_keeps_the_rule_for_ties(tmp_path):
    e = config.load(tiny.experiment(tmp_path, model={"source": "smollm"}))
    assert shrink(e, QUIET).feedback == e.feedback


@pytest.mark.parametrize(
    "source",
    [
        "Qwen/Qwen2-0.5B-Instruct", "HuggingFaceTB/SmolLM3-3B", "mistralai/Mixtral-8x7B-v0.1",
        "runs/sft/iteration_1/model",
    ],
)  # fmt: skip
def test_a_model_of_another_family_is_rehearsed_and_that_is_said(source, tmp_path, monkeypatch):
    tiny.on_first_device(monkeypatch)
    e = config.load(tiny.experiment(tmp_path, model={"source": source}))
    console = Console(record=True, width=60)
    small = shrink(e, console)
    text = console.export_text()
    assert f"'{source}' tells no family" in text and "SmolLM2's" in text
    assert (Path(small.model.source) / "model.safetensors").exists()


def test_a_known_family_needs_no_such_word(tmp_path):
    console = Console(record=True, width=60)
    shrink(config.load(tiny.experiment(tmp_path, model={"source": "smollm"})), console)
    assert "tells no family" not in console.export_text()


def test_all_processes_call_the_inputs_of_a_run_in_a_bucket_alike(tmp_path, monkeypatch):
    """They compare the start model's name; each may write the files into a cache of its own."""
    monkeypatch.setenv("SELM_CACHE", str(tmp_path / "cache"))
    e = config.load(tiny.experiment(tmp_path, output="gs://bucket/run"))
    monkeypatch.setattr(command, "make_model", lambda folder, family: folder.mkdir(parents=True))
    found = []
    for index in range(2):
        monkeypatch.setattr(multihost, "index", lambda i=index: i)
        small = shrink(e, QUIET)
        found.append((small.model.source, small.data.train))
        assert Path(small.model.source).is_dir()
    assert found[0] == found[1] and str(tmp_path) in found[0][1]


@pytest.mark.slow
def test_it_runs_to_its_end_though_all_answers_tie(mine):
    small = shrink(mine, QUIET)
    iterate(Run(small, QUIET))
    record = artifacts.Stages(Run(small).folder.iteration(1)).read()
    assert record["train"]["counts"]["updates"] > 0 and record["export"]["done"]


def test_the_tasks_of_the_capability_guard_are_left_out(tmp_path):
    tasks = {"tasks": ["arc_easy"], "task_limit": 5, "samples": 2}
    e = config.load(tiny.experiment(tmp_path, model={"source": "smollm"}, evaluation=tasks))
    found = shrink(e, QUIET).evaluation
    assert (found.samples, found.tasks, found.task_limit) == (2, (), None)
