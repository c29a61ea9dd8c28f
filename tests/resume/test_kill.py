"""Runs that are killed at random (kill -9) end with the same bytes as uninterrupted ones.

This holds for runs with one process and with two.
"""

from __future__ import annotations

import signal

import pytest
import runs
from killing import KILLS, kill

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("shape", "kills"), KILLS)
def test_killed_runs_end_with_the_same_bytes(file, whole, shape, kills, tried):
    expected, stages = whole(shape)
    where = file.parent / f"killed-{shape[1]}"
    told = kill(file, where, shape, kills, stages)
    found = runs.content(runs.finish(file, where, shape))
    tried(f"{shape[1]} x {shape[0]} devices: {told}")
    assert not runs.differences(found, expected)


def test_processes_left_by_a_killed_one_say_that_all_must_start_again(file, whole, tried):
    expected, _ = whole(runs.TWO)
    where = file.parent / "left"
    run = runs.start(file, where, runs.TWO)
    assert runs.wait_for(run, where / "run", (1, "train")), run.output()
    run.signal(signal.SIGKILL, which=0)
    killed, left = run.wait()
    # 76 of ours, or SIGABRT of jax's own watch over the coordinator: whichever sees it first.
    assert killed == -9 and left in (76, -6), run.output()
    tried(f"process 0 of 2 killed: the other left with {left}")
    found = runs.content(runs.finish(file, where, runs.TWO))
    assert not runs.differences(found, expected)
