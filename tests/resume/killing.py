"""Kills a run (kill -9) at random moments of its stages, each time it is started again."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter

import pytest
import runs

# A shape of processes and devices, and how often it is killed: once in each stage, or at more
# moments of it.
KILLS = [
    (runs.ONE, len(runs.ORDER)),
    (runs.TWO, len(runs.ORDER)),
    pytest.param(runs.ONE, 40, marks=pytest.mark.long),
    pytest.param(runs.TWO, 40, marks=pytest.mark.long),
]


def kill(file, where, shape, kills, stages, *overrides, mirrors=None) -> str:
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


def _name(at) -> str:
    return at if isinstance(at, str) else f"in {at[1]} {at[0]}"
