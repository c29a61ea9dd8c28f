"""`selm redo` and `selm show` on a run of two iterations."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny
from rich.console import Console

from selm_jax import cli, config
from selm_jax.commands.redo import ORDER, RedoError, redo
from selm_jax.commands.runs import settings_of
from selm_jax.commands.show import show
from selm_jax.iterate import iterate, run_stage
from selm_jax.run.run import Run
from selm_jax.shell.artifacts import ArtifactError, Stages
from selm_jax.shell.lock import only_one

QUIET = Console(quiet=True)
NAMES = [stage.name for stage in ORDER]


@pytest.fixture
def finished(finished_run):
    """The folder of a finished run of two iterations; its experiment lies beside it."""
    return finished_run / "run"


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of it that may be changed."""
    tiny.on_first_device(monkeypatch)
    return Path(shutil.copytree(finished, tmp_path / "run"))


def content(run: Path) -> dict[str, object]:
    """Tables, weights and metrics, but for times and for the digests of model cards."""
    found: dict[str, object] = {
        str(f.relative_to(run)): repr(pq.read_table(f).to_pydict())
        for f in run.rglob("iteration_*/**/*.parquet")
    }
    for file in run.rglob("*.safetensors"):
        found[str(file.relative_to(run))] = file.read_bytes()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {k: v for k, v in each.items() if not k.startswith(("time/", "memory/"))} for each in lines
    ]
    kept.sort(key=lambda m: (m["iteration"], m["stage"], m.get("step", 0)))
    return found | {"metrics": json.dumps(kept).encode()}


def recorded(run: Path) -> set[tuple[int, str]]:
    return {(t, name) for t in (0, 1, 2) for name in Stages(run / f"iteration_{t}").read()}


ALL = {(0, "evaluate"), *((t, name) for t in (1, 2) for name in NAMES)}


def test_the_order_is_that_of_a_run(finished):
    assert list(Stages(finished / "iteration_1").read()) == NAMES


@pytest.mark.parametrize(
    ("stage", "t", "gone"),
    [
        pytest.param("rank", 2, {(2, name) for name in NAMES[1:]}, marks=pytest.mark.slow),
        ("train", 1, {(1, name) for name in NAMES[3:]} | {(2, name) for name in NAMES}),
        ("evaluate", 1, {(1, "evaluate")}),
        ("evaluate", 0, {(t, "evaluate") for t in (0, 1, 2)}),
        # Its checkpoints are gone.
        pytest.param("export", 2, {(2, name) for name in NAMES[3:]}, marks=pytest.mark.slow),
    ],
)
def test_a_stage_and_what_follows_are_forgotten_and_done_again_to_the_same_bytes(
    run, finished, stage, t, gone
):
    redo(run, stage, t)
    assert recorded(run) == ALL - gone
    for u, name in gone:
        left = {"rank": "ranked.parquet", "export": "model", "evaluate": "heldout.parquet"}
        assert not (run / f"iteration_{u}" / left.get(name, "none")).exists()
    iterate(Run(settings_of(run), QUIET))
    assert recorded(run) == ALL and content(run) == content(finished)


def test_other_settings_can_be_used_then(run):
    changed = config.load(run / "config.yaml", [("output", str(run)), ("feedback.min_margin", 1.0)])
    with pytest.raises(ArtifactError, match=f"`selm redo {re.escape(str(run))} rank -t 1`"):
        iterate(Run(changed, QUIET))
    redo(run, "rank", 1)
    run_stage(Run(changed, QUIET), "rank", 1)


def test_what_others_put_into_the_folder_stays(run):
    mine = run / "iteration_2/model/notes.txt"
    mine.write_text("mine")
    lines = redo(run, "train", 2)
    assert mine.read_text() == "mine" and [str(mine) in line for line in lines].count(True) == 1
    assert {f.name for f in mine.parent.iterdir()} == {"notes.txt"}


def test_an_entry_that_was_changed_by_hand_can_be_redone(run):
    file = run / "iteration_2/stage.json"
    file.write_text(file.read_text().replace('"seconds": ', '"seconds": 1'))
    with pytest.raises(ArtifactError, match="selm redo .* generate -t 2"):
        Stages(file.parent).read()
    redo(run, "generate", 2)
    assert Stages(file.parent).read() == {}


def test_it_is_refused(run, tmp_path):
    with pytest.raises(RedoError, match="did you mean 'train'.*Stages: generate, rank"):
        redo(run, "trian", 1)
    with pytest.raises(RedoError, match="iteration 3 has not begun"):
        redo(run, "train", 3)
    with pytest.raises(RedoError, match="not a run folder"):
        redo(tmp_path, "train", 1)
    before = content(run)
    with only_one(run), pytest.raises(ArtifactError, match="another process"):
        redo(run, "train", 1)
    assert content(run) == before


@pytest.mark.parametrize(
    ("stage", "change"),
    [("generate", ("rollout.top_p", 0.9)), ("score", ("training.row_length", 64)),
     ("train", ("training.checkpoints_kept", 2))],
)  # fmt: skip
def test_a_stage_that_never_produced_anything_blocks_no_changed_setting(run, stage, change):
    """It was begun and stopped before its first part, checkpoint or table."""
    redo(run, "generate", 1)
    shutil.rmtree(run / "iteration_2")
    old = Run(settings_of(run), QUIET)
    for before in NAMES[: NAMES.index(stage)]:
        run_stage(old, before, 1)
    record = Stages(run / "iteration_1")
    record.begin(stage, {"prompts": "others"}, {change[0]: "other"})
    changed = config.load(run / "config.yaml", [("output", str(run)), change])
    run_stage(Run(changed, QUIET), stage, 1)
    assert record.read()[stage]["done"]


# --- selm show ----------------------------------------------------------------------------------


def shown(run: Path, width: int = 1000) -> str:
    """Returns what `selm show` prints; the default console is too wide for a path to be broken."""
    console = Console(file=io.StringIO(), width=width, markup=False)
    show(run, console)
    return console.file.getvalue()


def test_show_of_a_finished_run(run):
    text = shown(run)
    assert f"{run}: finished" in text and "selm, ranker length, seed 42" in text
    assert re.search(r"iteration 2, train, update \d+: loss \d", text)
    assert re.search(r"iteration 2, evaluate: reward_greedy", text)
    assert re.search(r"disk: [\d.]+ [kM]B", text) and "-" in text.splitlines()[3]
    lines = shown(run, 60).splitlines()
    assert (
        max(len(x) for x in lines if run.name not in x and "/" not in x) <= 60
    )  # paths stay whole


def test_show_of_a_stopped_run_tells_the_time_left(run):
    redo(run, "train", 2)
    Stages(run / "iteration_2").begin("train", {}, {})
    text = shown(run)
    assert "stopped, in iteration 2 of 2, train; time left: about" in text
    assert "and the rest of train. `selm run` continues it" in text and "begun" in text
    redo(run, "train", 1)
    assert "time left: not known before iteration 1 is done" in shown(run)


def test_show_knows_a_run_at_work(run):
    redo(run, "evaluate", 2)
    with only_one(run):
        assert re.search(rf"at work \(process {os.getpid()} on \S+\); time left: about", shown(run))
    assert "stopped; time left: about" in shown(run)


# --- run folders in place of experiment files -----------------------------------------------------


def test_a_run_folder_is_taken_for_its_experiment(run, tmp_path, monkeypatch, capsys):
    """Also where the folder was moved: its own config.yaml still says where it was made."""
    moved = run.rename(tmp_path / "moved")
    for verb in (["run"], ["measure", "-t", "1"], ["preview", "-n", "1"]):
        monkeypatch.setattr(sys, "argv", ["selm", *verb, str(moved)])
        cli.main()
    # Where a line is wrapped depends on the length of the path.
    told = f"{moved}: every stage is done already".replace(" ", "")
    assert told in "".join(capsys.readouterr().out.split())
    with pytest.raises(config.ConfigError, match="not a run folder. Give an experiment file"):
        settings_of(tmp_path)


def test_a_stage_says_how_many_of_its_seconds_it_compiled(run, monkeypatch):
    """Less than a second is not worth a word."""
    built = iter([10.0, 17.2, 20.0, 20.9])
    monkeypatch.setattr("selm_jax.shell.compiling.spent", lambda: next(built))
    for told in (True, False):
        redo(run, "rank", 2)
        run_stage(Run(settings_of(run), console := Console(record=True, width=200)), "rank", 2)
        assert ("(7 s spent on compiling)" in console.export_text()) is told
