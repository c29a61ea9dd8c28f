"""Runs that are stopped at random (kill -9, SIGTERM) end with the same bytes as uninterrupted ones.

This holds for runs with one process and with two.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections import Counter

import pytest
import runs

from selm_jax.shell.storage import Store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return runs.experiment(tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def whole(file):
    """whole(shape) -> the content of a run that nobody stopped, and its stages' seconds."""
    made = {}

    def make(shape):
        if shape not in made:
            # Twice: the second one has everything compiled, as those that are killed.
            runs.finish(file, file.parent / f"first-{shape[1]}", shape)
            folder = runs.finish(file, file.parent / f"whole-{shape[1]}", shape)
            made[shape] = runs.content(folder), runs.stages(folder)
        return made[shape]

    return make


@pytest.mark.parametrize(("shape", "kills"), [(runs.ONE, 40), (runs.TWO, 40)])
def test_killed_runs_end_with_the_same_bytes(file, whole, shape, kills, tried):
    expected, stages = whole(shape)
    where = file.parent / f"killed-{shape[1]}"
    told = _kill(file, where, shape, kills, stages)
    found = runs.content(runs.finish(file, where, shape))
    tried(f"{shape[1]} x {shape[0]} devices: {told}")
    assert not runs.differences(found, expected)


@pytest.mark.parametrize(("shape", "kills"), [(runs.ONE, 40), (runs.TWO, 40)])
def test_killed_runs_in_a_bucket_end_with_the_bytes_of_a_local_run(
    file, whole, shape, kills, tried
):
    """The processes have no folder in common, and every other attempt is on new machines."""
    pytest.importorskip("obstore", reason="obstore is not installed: no bucket is tried")
    expected, stages = whole(shape)
    where = file.parent / f"bucket-{shape[1]}"
    output = f"output=file://{where}/run"
    mirrors = file.parent / f"cache-{shape[0]}-{shape[1]}" / "runs"
    told = _kill(file, where, shape, kills, stages, output, mirrors=mirrors)
    # What a kill in the middle of a write leaves there: for the store, no object (test_storage).
    (where / "run/iteration_1/scores/.part-00001-of-00004.parquet.sha256#1").write_bytes(b"half")
    runs.finish(file, where, shape, output)
    found = runs.content_of(Store.at(output.removeprefix("output=")), where / "objects")
    tried(f"{shape[1]} x {shape[0]} devices, in a bucket: {told}")
    where_it_says_so = {
        "config.yaml", "manifest.json", *(f"iteration_{t}/model/README.md" for t in (1, 2)),
    }  # fmt: skip
    assert set(runs.differences(found, expected)) == where_it_says_so
    for name in where_it_says_so - {"manifest.json"}:
        assert found[name].replace(output[7:].encode(), b"run") == expected[name]


def _kill(file, where, shape, kills, stages, *overrides, mirrors=None) -> str:
    """Begins a run again and again, and kills it; returns where it was killed how often.

    Each kill is meant for a stage, in their order, and comes at a random moment of it. Of one
    stage's kills the earlier comes first: after one that comes too late, the stage is done.
    """
    chance = random.Random(shape[1])
    targets = sorted((i % len(runs.ORDER), chance.random()) for i in range(kills))
    inside = Counter()
    for number, part in targets:
        at = runs.ORDER[number]
        if mirrors is not None and chance.random() < 0.5:
            shutil.rmtree(mirrors, ignore_errors=True)
        run = runs.start(file, where, shape, *overrides)
        if not runs.wait_for(run, where / "run", at):
            assert run.wait() == [0] * shape[1], run.output()
            break
        # Of the stage it is at: that may be a later one, if the last kill came too late.
        at = next((k for k, v in runs.stages(where / "run").items() if not v["done"]), at)
        moment = time.monotonic() + part * stages[at]["seconds"]
        # No later than the stage's end: on a machine that has become faster, the run might be over.
        while time.monotonic() < moment and not runs.is_done(where / "run", at):
            time.sleep(0.002)
        run.kill(first=chance.randrange(shape[1]))
        begun = [k for k, v in runs.stages(where / "run").items() if not v["done"]]
        inside[begun[0] if begun else "between stages"] += 1
    assert sum(inside.values()) >= 0.9 * kills
    assert {"generate", "score", "train", "evaluate"} <= {at[1] for at in inside}
    of = ", ".join(f"{n} {_name(at)}" for at, n in inside.items())
    return f"{sum(inside.values())} kills, {of}"


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


def _name(at) -> str:
    return at if isinstance(at, str) else f"in {at[1]} {at[0]}"


@pytest.mark.parametrize("shape", [runs.ONE, runs.TWO])
@pytest.mark.parametrize("at", [(1, "generate"), (1, "train")])
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


@pytest.mark.parametrize("shape", [runs.ONE, runs.TWO])
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
