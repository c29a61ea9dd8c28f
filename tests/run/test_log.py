"""TensorBoard and wandb are opened before any work, and have every line of metrics.jsonl once."""

from __future__ import annotations

import random
import struct
import sys
import types
from collections import Counter

import pytest
import tiny
from rich.console import Console
from tensorboardX.proto import event_pb2

from selm_jax import config
from selm_jax.iterate import iterate
from selm_jax.run.log import LogError, Writers
from selm_jax.run.run import Run
from selm_jax.shell import loglines

QUIET = Console(quiet=True)


def drawn(run):
    """(tag, step) of every value in the event files, by how often it is there."""
    run.folder.writers.tensorboard.close()  # it writes in a thread of its own
    found = Counter()
    for file in (run.folder.path / "tensorboard").glob("events.out.tfevents.*"):
        raw = file.read_bytes()
        while raw:
            (size,) = struct.unpack("<Q", raw[:8])
            event = event_pb2.Event.FromString(raw[12 : 12 + size])
            found.update((value.tag, event.step) for value in event.summary.value)
            raw = raw[16 + size :]
    return found


def recorded(run):
    found = Counter()
    for line in loglines.read_lines(run.folder.metrics_file):
        step = f"iteration_{line['iteration']}/" if "step" in line else ""
        tag = f"{line['stage']}/{step}loss"
        found[tag, line.get("step", line["iteration"])] += 1
    return found


@pytest.fixture
def begun(tmp_path):
    """begun(overrides...) -> the run of these settings; another one each time, as after a kill."""
    (tmp_path / "model").mkdir()  # nothing here reads it
    file = tiny.experiment(tmp_path, log={"tensorboard": True})

    def begin(*overrides):
        run = Run(config.load(file, overrides), QUIET)
        run.folder.path.mkdir(exist_ok=True)
        return run

    return begin


class Wandb(types.ModuleType):
    """`wandb` as far as it is called, with its own signatures (0.31); `rows` are by the run's id.

    It keeps what it has: a step that is not beyond the last one is left out with a warning.
    """

    def __init__(self, error=None):
        super().__init__("wandb")
        self.error, self.rows, self.inits = error, {}, []

    def init(self, entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None,
             config=None, config_exclude_keys=None, config_include_keys=None, allow_val_change=None,
             group=None, job_type=None, mode=None, force=None, reinit=None, resume=None,
             resume_from=None, fork_from=None, save_code=None, tensorboard=None,
             sync_tensorboard=None, monitor_gym=None, settings=None, anonymous=None):  # fmt: skip
        if self.error is not None:
            raise self.error
        self.inits.append({"project": project, "id": id, "name": name, "resume": resume})
        assert id not in self.rows or resume in ("allow", "must")
        return WandbRun(self.rows.setdefault(id, {}))


class WandbRun:
    def __init__(self, rows):
        self.rows = rows

    def log(self, data, step=None, commit=None):
        assert step is not None
        if step > max(self.rows, default=-1):
            self.rows[step] = dict(data)


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_resume_repeats_no_step(begun):
    """As a run that is killed after update 3, whose last checkpoint is of update 1."""
    first = begun()
    for step in (1, 2, 3):
        first.folder.log("train", 1, {"step": step, "loss": 0.5})
    again = begun()
    again.folder.forget(lambda line: line["step"] > 1)
    for step in (2, 3, 4, 5):
        again.folder.log("train", 1, {"step": step, "loss": 0.5})
    assert drawn(again) == {("train/iteration_1/loss", step): 1 for step in range(1, 6)}


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_the_drawing_is_the_record(begun, wandb, seed):
    """Lines, kills (with a torn line), and lines taken back, in any order."""
    dice = random.Random(seed)
    run = begun("log.wandb=project")
    step = {1: 0, 2: 0}
    for _ in range(60):
        t = dice.choice((1, 2))
        what = dice.random()
        if what < 0.7:
            step[t] += 1
            run.folder.log("train", t, {"step": step[t], "loss": 0.5})
        elif what < 0.8:
            run.folder.log("evaluate", t, {"loss": None if dice.random() < 0.3 else 0.5})
            run.folder.forget(
                lambda line, t=t: (line["stage"], line["iteration"]) == ("evaluate", t)
            )
        elif what < 0.9:
            with run.folder.metrics_file.open("a") as file:
                file.write('{"stage": "train", "iter')
            run = begun("log.wandb=project")
        else:
            step[t] = dice.randint(0, step[t])
            run.folder.forget(
                lambda line, t=t: (
                    (line["stage"], line["iteration"]) == ("train", t) and line["step"] > step[t]
                )
            )
    run.folder.log("evaluate", 9, {"loss": 0.5})
    assert drawn(run) == recorded(run)
    (rows,) = wandb.rows.values()
    assert sorted(rows) == list(range(1, max(rows) + 1))


def test_wandb_goes_on_in_its_run(begun, wandb):
    first = begun("log.wandb=mine")
    for step in (1, 2, 3):
        first.folder.log("train", 1, {"step": step, "loss": step / 8})
    again = begun("log.wandb=mine")
    again.folder.forget(lambda line: line["step"] > 1)
    for step in (2, 3, 4, 5):
        again.folder.log("train", 1, {"step": step, "loss": step / 8})
    one, other = wandb.inits
    assert one == other and one["project"] == "mine" and one["resume"] == "allow"
    (rows,) = wandb.rows.values()
    assert [row["train/iteration_1/loss"] for row in rows.values()] == [n / 8 for n in range(1, 6)]
    begun("log.wandb=mine", f"output={first.folder.path}_2").folder.log(
        "train", 1, {"step": 1, "loss": 1.0}
    )
    assert wandb.inits[2]["id"] != one["id"]


def test_wandb_takes_what_is_new_after_a_line_out_of_the_midst(begun, wandb):
    run = begun("log.wandb=mine")
    run.folder.log("evaluate", 0, {"loss": 0.0})
    for step in (1, 2):
        run.folder.log("train", 1, {"step": step, "loss": step / 8})
    run.folder.forget(lambda line: line["stage"] == "evaluate")
    run.folder.log("train", 1, {"step": 3, "loss": 3 / 8})
    (rows,) = wandb.rows.values()
    found = [row.get("train/iteration_1/loss") for row in rows.values()]
    assert found == [None, 1 / 8, 2 / 8, 3 / 8]


class UsageError(Exception):
    pass


def test_a_tracker_that_cannot_be_had_is_found_before_any_work(tmp_path, monkeypatch):
    error = UsageError("No API key configured")
    monkeypatch.setitem(sys.modules, "wandb", Wandb(error))
    file = tiny.experiment(tmp_path, log={"tensorboard": True, "wandb": "mine"})
    run = Run(config.load(file), QUIET)
    with pytest.raises(LogError, match=f"{error}.*wandb login.*WANDB_MODE=offline") as caught:
        iterate(run)
    assert "\n" not in str(caught.value)
    assert not run.folder.iteration(0).exists() and not run.folder.metrics_file.exists()


def test_one_that_is_not_installed(begun, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = begun("log.wandb=mine")
    with pytest.raises(LogError, match="pip install"):
        Writers(run.folder.path, run.experiment)
