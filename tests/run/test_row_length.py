"""A run whose rows are fitted to its examples (`training.row_length: auto`)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.iterate import iterate
from selm_jax.run.run import Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    """Runs of one iteration that differ in `training.row_length` alone."""
    folder = tmp_path_factory.mktemp("row_length")
    file = tiny.experiment(folder, iterations=1, training__learning_rate=1e-3)
    made = {}
    for length in ("auto", "256"):
        overrides = [f"training.row_length={length}", f"output={folder / length}"]
        made[length] = Run(config.load(file, overrides), Console(quiet=True))
        iterate(made[length])
    return made


def lines(run: Run) -> list[dict]:
    return [json.loads(line) for line in run.folder.metrics_file.read_text().splitlines()]


@pytest.mark.slow
def test_the_results_are_those_of_any_other_length(runs):
    fitted, fixed = (lines(run) for run in runs.values())
    assert len(fitted) == len(fixed)
    for a, b in zip(fitted, fixed, strict=True):
        assert a.keys() == b.keys()
        numbers = {
            key
            for key in a
            if not isinstance(a[key], str) and not key.startswith(("time/", "memory/"))
        }
        # In the first update the policy is the reference, so rounding decides its accuracy.
        for key in numbers - {"padded", "padding", "rewards/accuracies"}:
            np.testing.assert_allclose(a[key], b[key], rtol=2e-3, atol=2e-4, err_msg=key)


@pytest.mark.slow
def test_the_shape_is_in_the_report_and_has_less_padding(runs):
    counts = {}
    for name, run in runs.items():
        stages = json.loads((run.folder.iteration(1) / "stage.json").read_text())
        counts[name] = stages["train"]["counts"]
        recorded = stages["train"]["settings"]["training.row_length"]
        assert str(recorded) == name
    assert counts["256"]["row_length"] == 256 and counts["auto"]["row_length"] % 32 == 0
    assert counts["auto"]["tokens_useful"] == counts["256"]["tokens_useful"]
    assert counts["auto"]["tokens_padded"] < counts["256"]["tokens_padded"]
    padded = [line["padded"] for line in lines(runs["auto"]) if "padded" in line]
    assert sum(padded) == counts["auto"]["tokens_padded"]


@pytest.mark.slow
def test_started_again_it_has_nothing_to_do(runs):
    run = runs["auto"]
    before = run.folder.metrics_file.read_bytes()
    iterate(Run(run.experiment, Console(quiet=True)))
    assert run.folder.metrics_file.read_bytes() == before
