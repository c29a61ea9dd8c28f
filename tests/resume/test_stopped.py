"""Runs that are told to stop (SIGTERM) go on later, also with other processes and devices."""

from __future__ import annotations

import json
import signal
import time

import pytest
import runs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("shape", "at"),
    [
        (runs.ONE, (1, "generate")),
        pytest.param(runs.ONE, (1, "train"), marks=pytest.mark.long),
        pytest.param(runs.TWO, (1, "generate"), marks=pytest.mark.long),
        (runs.TWO, (1, "train")),
    ],
)
def test_a_run_that_is_told_to_stop_saves_and_leaves_with_75(file, whole, shape, at, tried):
    """SIGTERM to one process stops all of them, after the same update."""
    expected, _ = whole(shape)
    where = file.parent / f"stopped-{shape[1]}-{at[1]}"
    run = runs.start(file, where, shape)
    assert runs.wait_for(run, where / "run", at), run.output()
    metrics = where / "run" / "metrics.jsonl"
    while at[1] == "train" and not _steps(metrics) and run.running():
        time.sleep(0.002)
    run.signal(signal.SIGTERM, which=shape[1] - 1)
    statuses = run.wait()
    assert statuses == [75] * shape[1], (statuses, run.output())
    assert "told to stop" in run.output()
    if at[1] == "train" and len(_steps(metrics)) < 7:  # jax passes the notice on within a second
        saved = [int(p.name) for p in (where / "run/iteration_1/checkpoints").glob("[0-9]*")]
        assert saved[-1:] == _steps(metrics)[-1:], "the last update's state was saved"
        tried(f"{shape[1]} x {shape[0]} devices: SIGTERM, saved after update {saved[-1]} of 7")
    found = runs.content(runs.finish(file, where, shape))
    assert not runs.differences(found, expected)


@pytest.mark.parametrize("shape", [runs.ONE, pytest.param(runs.TWO, marks=pytest.mark.long)])
def test_a_run_that_is_told_to_stop_while_it_ranks_keeps_what_is_ranked(file, shape, tried):
    """SIGTERM to one process, in the second of four parts; no other prompt is asked about twice."""
    slow = ("feedback.ranker=slow_rule:length", "feedback.settings={workers: 0}")
    rest = ("iterations=1", "data.portions=2", "training.learning_rate=1e-3", "data.heldout=null")
    expected = runs.content(
        runs.finish(file, file.parent / f"slow-{shape[1]}", shape, *slow, *rest)
    )
    where = file.parent / f"slow-stopped-{shape[1]}"
    run = runs.start(file, where, shape, *slow, *rest)
    asked, scores = where / "asked.txt", where / "run/iteration_1/scores"
    while run.running() and not list(scores.glob(".*.sha256")):  # with it, a part is there
        time.sleep(0.01)
    run.signal(signal.SIGTERM, which=shape[1] - 1)
    assert run.wait() == [75] * shape[1], run.output()
    kept = len(list(scores.glob(".*.sha256")))
    assert 1 <= kept < 4
    before = asked.read_text().splitlines()
    found = runs.content(runs.finish(file, where, shape, *slow, *rest))
    assert not runs.differences(found, expected)
    after = asked.read_text().splitlines()[len(before) :]
    assert len(after) == (16 - 4 * kept) * 3  # candidates
    tried(f"{shape[1]} x {shape[0]} devices: SIGTERM while ranking, {kept} parts of 4 were kept")


def _steps(metrics) -> list[int]:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [m["step"] for m in map(json.loads, lines) if m["stage"] == "train"]


@pytest.mark.parametrize(("before", "after"), [(runs.TWO, runs.ONE), (runs.ONE, runs.TWO)])
def test_a_run_goes_on_with_other_processes_and_another_mesh(file, whole, before, after, tried):
    """Stopped in the middle of training on 2 x 4 devices, ended on one; and the other way round."""
    expected, _ = whole(after)
    where = file.parent / f"moved-{before[1]}-{after[1]}"
    metrics = where / "run" / "metrics.jsonl"
    run = runs.start(file, where, before)
    assert runs.wait_for(run, where / "run", (1, "train")), run.output()
    while before[1] == 1 and not _steps(metrics) and run.running():
        time.sleep(0.002)  # alone, it would stop before the first update
    run.signal(signal.SIGTERM)
    assert run.wait() == [75] * before[1], run.output()
    done, updates = metrics.read_text(), len(_steps(metrics))
    assert 0 < updates < 7
    folder = runs.finish(file, where, after)
    assert metrics.read_text().startswith(done), "it began anew"
    losses = [m["loss"] for m in runs.content(folder)["metrics.jsonl"] if m["stage"] == "train"]
    others = [m["loss"] for m in expected["metrics.jsonl"] if m["stage"] == "train"]
    worst = max(abs(a - b) / b for a, b in zip(losses, others, strict=True))
    tried(
        f"from {before[1]} x {before[0]} devices, after update {updates} of 7, to "
        f"{after[1]} x {after[0]}: losses differ by {worst:.1e} at most"
    )
    assert worst < 1e-5
