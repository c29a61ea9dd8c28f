"""A run with a stuck process ends by itself, and the same command finishes it."""

from __future__ import annotations

import signal
import socket

import pytest
import runs

pytestmark = pytest.mark.slow

PATIENCE = 15  # seconds; jax itself would end the run after 100


@pytest.mark.parametrize("stage", ["generate", "train"])
def test_a_run_whose_second_host_is_suspended_is_given_up_and_goes_on(tmp_path, stage):
    file = runs.experiment(tmp_path)
    where = tmp_path / "stuck"
    run = runs.start(file, where, runs.TWO, patience=PATIENCE)
    assert runs.wait_for(run, where / "run", (1, stage)), run.output()
    run.signal(signal.SIGSTOP, 1)
    run.wait_for(0)
    run.kill(1)
    statuses, told = run.wait(), run.output()
    assert statuses == [76, -signal.SIGKILL], told
    assert "no progress for" in told and f"process 1 on host {socket.gethostname()}" in told
    runs.finish(file, where, runs.TWO)
