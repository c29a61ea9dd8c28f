"""The model card of an iteration has the numbers of that iteration's policy."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from rich.console import Console

from selm_jax import config
from selm_jax.iterate import iterate
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.shell.sealed import seal

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def output(finished_run, tmp_path_factory):
    return shutil.copytree(finished_run / "run", tmp_path_factory.mktemp("card") / "run")


@pytest.fixture
def again(finished_run, output):
    """Gives the command again; the run."""

    def go() -> Run:
        run = Run(config.load(finished_run / "experiment.yaml", [f"output={output}"]), QUIET)
        iterate(run)
        return run

    return go


def measured(run: Run, t: int) -> float:
    lines = map(json.loads, run.folder.metrics_file.read_text().splitlines())
    (line,) = [m for m in lines if (m["stage"], m["iteration"]) == ("evaluate", t)]
    return line["heldout/reward_greedy"]


def test_each_card_holds_its_own_evaluation_and_that_of_its_start(again):
    run = again()
    for t in (1, 2):
        card = (run.folder.model(t) / "README.md").read_text()
        found = re.findall(r"\| heldout/reward_greedy \| (\S+) \|", card)
        assert found == [f"{measured(run, each):.5g}" for each in (t, t - 1)]
        assert "This policy, on held-out prompts:" in card and "no held-out evaluation" not in card
        assert not (run.folder.iteration(t) / "README.md").exists()


def test_a_card_that_a_kill_left_incomplete_is_completed_and_nothing_is_done_again(again):
    run = again()
    card = run.folder.model(1) / "README.md"
    whole, digest = card.read_bytes(), run.policy(1).digest
    card.write_text("as the export wrote it")
    assert run.policy(1).digest == digest
    run = again()
    assert card.read_bytes() == whole and not run.wanted.worked


def test_a_card_that_an_earlier_version_sealed_stays_as_it_is(again):
    run = again()
    card, stages = run.folder.model(2) / "README.md", artifacts.Stages(run.folder.iteration(2))
    entries = stages.read()
    before = stages.file.read_bytes()
    card_now = card.read_bytes()
    try:
        card.write_text("sealed with the model")
        model = run.folder.model(2)
        for stage, of in (("export", "outputs"), ("evaluate", "inputs")):
            entry = {k: v for k, v in entries[stage].items() if k != "sha256"}
            name = "model" if of == "outputs" else "policy"
            entry[of] = entry[of] | {name: artifacts.digest(model)}
            if of == "outputs":
                entry["files"] = {"model": artifacts.digests(model)}
            entries[stage] = seal(entry, stage)
        artifacts.write_json(stages.file, entries)
        assert not again().wanted.worked
        assert card.read_text() == "sealed with the model"
        card.write_text("another")
        with pytest.raises(artifacts.ArtifactError, match=r"model.*changed: README\.md"):
            again()
    finally:
        stages.file.write_bytes(before)
        card.write_bytes(card_now)
