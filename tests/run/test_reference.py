"""The reference log-probabilities in examples.parquet have the digest of the right model."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from selm_jax.preferences.examples import Example
from selm_jax.run.inputs import Model, StoredTable, Training
from selm_jax.shell import artifacts
from selm_jax.stages.train import check_reference
from selm_jax.tables import examples as table

scoring = importlib.import_module("selm_jax.stages.score")
EXAMPLES = [Example("p", (1, 2), ((3,), (4,)), {"chosen": 0, "rejected": 1})]


class Scored:
    """Iteration 2 of a run behind its stage `score`; each model is a folder of a word."""

    def __init__(self, folder: Path, fixed: bool, policy: str):
        for name, word in (("start", "start"), ("policy", policy)):
            (folder / name).mkdir(parents=True)
            (folder / name / "model.safetensors").write_text(word)
        self.folder = folder / "iteration_2"
        self.folder.mkdir()
        self.policy = Model(folder / "policy")
        self.reference = Model(folder / "start") if fixed else self.policy
        self.examples = StoredTable(self.folder, "examples.parquet")
        step = SimpleNamespace(
            folder=self.folder, task=SimpleNamespace(reference_free=True, uses_shared=False),
            settings=SimpleNamespace(training=SimpleNamespace(importance=None)),
        )  # fmt: skip
        scoring.score.body(step, [], StoredTable(self.folder, "-"), self.reference, None)

    def check(self) -> None:
        check_reference(self.examples, self.policy, self.reference)


@pytest.fixture
def scored(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "paired_examples", lambda *given: (EXAMPLES, {}))
    return lambda fixed, policy="trained", name="run": Scored(tmp_path / name, fixed, policy)


def spoil(model: Model) -> None:
    (model.path / "model.safetensors").write_text("another model")


@pytest.mark.parametrize("fixed", [True, False], ids=["start", "previous"])
def test_the_digest_is_that_of_the_reference(scored, fixed):
    run = scored(fixed)
    assert table.reference_digest(run.examples.path) == run.reference.digest
    run.check()
    spoil(run.reference)
    with pytest.raises(
        artifacts.ArtifactError, match=f"log-prob.* {run.reference.path} has"
    ) as told:
        run.check()
    said = str(told.value)
    assert str(run.examples.path) in said and "score this iteration again" in said


def test_checkpoints_are_those_of_the_start_whatever_the_reference_is(scored):
    starts = [
        Training(run.folder).checkpoints(run.policy).start
        for run in (scored(True), scored(True, policy="other", name="other"))
    ]
    assert starts[0] == artifacts.digest(scored(True, name="again").policy.path) != starts[1]


def test_what_a_fixed_reference_scored_is_the_same_for_every_policy(scored):
    """Runs of a sweep share it: it says nothing of the policies, which they do not share."""
    one, two = (scored(True, policy=word, name=word).examples.path for word in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_files_of_earlier_versions_keep_their_meaning(scored):
    """Under the same name they had the digest of the policy that the iteration starts from."""
    run = scored(True)
    table.write(run.examples.path, EXAMPLES)
    old = pq.read_table(run.examples.path)
    old = old.replace_schema_metadata({"reference": run.policy.digest})
    pq.write_table(old, run.examples.path)
    run.check()
    spoil(run.policy)
    with pytest.raises(artifacts.ArtifactError, match=f"starts from .* {run.policy.path} has"):
        run.check()
