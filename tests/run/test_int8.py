"""`rollout.weights: int8` in a run: the gap is reported, and one that is too large stops it."""

from __future__ import annotations

import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.iterate import iterate, run_stage
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run

pytest.importorskip("qwix", reason="qwix is not installed (the extra `qlora`)")
QUIET = Console(quiet=True)


@pytest.mark.slow
def test_the_gap_of_int8_weights_is_reported_and_stops_a_run_above_its_limit(tmp_path):
    file = tiny.experiment(
        tmp_path, data__heldout=None, rollout__weights="int8",
        training__importance={"mode": "token_truncate"},
    )  # fmt: skip
    run = Run(config.load(file), QUIET)
    iterate(run)
    found = [line for t in run.iterations for line in run.folder.logged("score", t)]
    assert len(found) == 2
    for line in found:
        assert 1e-5 < line["gap/mean"] < 0.05
        assert line["importance/ratio"] == pytest.approx(1, abs=0.05)
    limit = "rollout.gap={warn: 1e-9, stop: 1e-8}"
    strict = Run(config.load(file, [limit, f"output={tmp_path / 'strict'}"]), QUIET)
    for stage in ("generate", "rank"):
        run_stage(strict, stage, 1)
    with pytest.raises(RunError, match="more than rollout.gap.stop"):
        run_stage(strict, "score", 1)
