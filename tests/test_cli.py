"""The command line's names for a run's stages."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from selm_jax.cli import app


@pytest.fixture
def ran(monkeypatch):
    """The stages that verbs have run."""
    seen = []
    monkeypatch.setattr("selm_jax.commands.runs.opened", lambda *_, **__: None)
    monkeypatch.setattr("selm_jax.iterate.run_stage", lambda _, name, t: seen.append((name, t)))
    return seen


@pytest.mark.parametrize(
    ("verb", "stage"),
    [
        ("generate", "generate"), ("rank", "rank"), ("score", "score"), ("train", "train"),
        ("measure", "evaluate"), ("evaluate", "evaluate"),
    ],
)  # fmt: skip
def test_a_verb_runs_its_stage(ran, verb, stage):
    told = CliRunner().invoke(app, [verb, "some.yaml", "-t", "3"], catch_exceptions=False)
    assert told.exit_code == 0 and ran == [(stage, 3)]
    assert ("`selm measure`" in told.stderr) == (verb == "evaluate")


def test_the_old_name_of_measure_is_not_shown():
    told = CliRunner().invoke(app, ["--help"])
    assert "│ measure" in told.output and "│ evaluate" not in told.output
