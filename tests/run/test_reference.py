"""Whose log-probabilities examples.parquet holds, under the name of that model and no other."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from selm_jax.preferences.examples import Example
from selm_jax.shell import artifacts
from selm_jax.stages.train import checkpoints_of
from selm_jax.tables import examples as table

scoring = importlib.import_module("selm_jax.stages.score")  # a function hides the module
EXAMPLES = [Example("p", (1, 2), ((3,), (4,)), {"chosen": 0, "rejected": 1})]


class Models:
    """As much of a run in its second iteration as both stages ask; each model is a folder of a word."""

    experiment = SimpleNamespace(training=SimpleNamespace(checkpoints_kept=1))

    def __init__(self, folder: Path, fixed: bool, policy: str = "trained"):
        self.path, self.fixed = folder, fixed
        self.task = SimpleNamespace(reference_free=True)  # `score` computes nothing
        self.folder = SimpleNamespace(iteration=self.iteration)
        for name, word in (("start", "start"), ("policy", policy)):
            (folder / name).mkdir(parents=True)
            (folder / name / "model.safetensors").write_text(word)
        self.iteration(2).mkdir()

    def iteration(self, t: int) -> Path:
        return self.path / f"iteration_{t}"

    def policy(self, t: int) -> Path:
        return self.path / ("start" if t == 0 else "policy")

    def reference(self, t: int) -> Path:
        return self.policy(0 if self.fixed else t - 1)


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """scored(fixed, policy) -> such a run behind its stage `score`."""
    monkeypatch.setattr(scoring, "paired_examples", lambda run, t: (EXAMPLES, {}))

    def make(fixed: bool, policy: str = "trained", name: str = "run") -> Models:
        run = Models(tmp_path / name, fixed, policy)
        scoring.score(run, 2)
        run.task.reference_free = False
        return run

    return make


def spoil(folder: Path) -> None:
    (folder / "model.safetensors").write_text("another model")


@pytest.mark.parametrize("fixed", [True, False], ids=["start", "previous"])
def test_the_digest_is_that_of_the_reference(scored, fixed):
    run = scored(fixed)
    examples = run.folder.iteration(2) / "examples.parquet"
    assert table.reference_of(examples) == artifacts.digest(run.reference(2))
    checkpoints_of(run, 2)
    spoil(run.reference(2))
    with pytest.raises(artifacts.ArtifactError, match=f"log-prob.* {run.reference(2)} has") as told:
        checkpoints_of(run, 2)
    assert str(examples) in str(told.value) and "to score this iteration again" in str(told.value)


def test_checkpoints_are_those_of_the_start_whatever_the_reference_is(scored):
    run, other = scored(True), scored(True, policy="other", name="other")
    assert checkpoints_of(run, 2).start == artifacts.digest(run.policy(1))
    assert checkpoints_of(other, 2).start == artifacts.digest(other.policy(1))
    assert checkpoints_of(run, 2).start != checkpoints_of(other, 2).start


def test_what_a_fixed_reference_scored_is_the_same_for_every_policy(scored):
    """Runs of a sweep share it: it says nothing of the policies, which they do not share."""
    files = [
        scored(True, policy=word, name=word).iteration(2) / "examples.parquet"
        for word in ("one", "two")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_files_of_before_are_read_for_what_they_said(scored):
    """Under the same name they had the digest of the policy that the iteration starts from."""
    run = scored(True)
    start = artifacts.digest(run.policy(1))
    file = run.folder.iteration(2) / "examples.parquet"
    table.write(file, EXAMPLES)
    pq.write_table(pq.read_table(file).replace_schema_metadata({"reference": start}), file)
    assert checkpoints_of(run, 2).start == start
    spoil(run.policy(1))
    with pytest.raises(artifacts.ArtifactError, match=f"starts from .* {run.policy(1)} has"):
        checkpoints_of(run, 2)
