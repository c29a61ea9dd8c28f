"""`keep_models: last`: the last model stays on disk, and everything else is as with all of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.commands.redo import RedoError, redo
from selm_jax.iterate import iterate, run_stage
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.shell.artifacts import ArtifactError, Stages

QUIET = Console(quiet=True)
THREE = {"iterations": 3, "data__portions": 3, "training__learning_rate": 1e-3}


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        tiny.on_first_device(patch)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("keep_models")


def experiment(folder: Path, name: str, **changes) -> config.Experiment:
    file = tiny.experiment(folder, output=str(folder / name), **(THREE | changes))
    return config.load(file)


def models(run: Path) -> list[int]:
    return [t for t in (1, 2, 3) if (run / f"iteration_{t}/model").exists()]


def content(run: Path) -> dict[str, bytes]:
    """The tables, and the last model's weights."""
    files = [*run.rglob("*.parquet"), run / "iteration_3/model/model.safetensors"]
    return {str(f.relative_to(run)): f.read_bytes() for f in files}


SETTINGS = {
    "the policy before as reference": {},
    "a fixed reference": {"training__reference_policy": "start"},
    "the model before that is mixed in": {"rollout__mixture": {"kind": "nash", "weight": -2.0}},
    "the model before that is asked, too": {
        "feedback": {"ranker": "length", "budget": 8, "acquisition": "reward_gap"}
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=[pytest.mark.long] if "asked" in name else [])
        for name, changes in SETTINGS.items()
    ],
)
def test_the_same_run_with_one_model_left(tmp_path, changes, monkeypatch):
    """Also if it is stopped wherever a model is deleted, and started again."""
    iterate(Run(experiment(tmp_path, "all", **changes), QUIET))
    assert models(tmp_path / "all") == [1, 2, 3]
    last = experiment(tmp_path, "last", keep_models="last", **changes)
    remove, stops = artifacts.remove, []

    def stopping(path: Path) -> None:
        if path.name == "model" and path.parent.parent.name == "last" and path not in stops:
            stops.append(path)  # after the record is written, with half of the files gone
            (path / "model.safetensors").unlink()
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(artifacts, "remove", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            iterate(Run(last, QUIET))
    iterate(Run(last, QUIET))
    assert len(stops) == 2 and models(tmp_path / "last") == [3]
    assert content(tmp_path / "last") == content(tmp_path / "all")
    before = content(tmp_path / "last")
    iterate(Run(last, QUIET))  # nothing is left to do
    assert content(tmp_path / "last") == before


@pytest.fixture(scope="module")
def finished(folder):
    iterate(Run(experiment(folder, "run", keep_models="last"), QUIET))
    return folder / "run"


@pytest.mark.slow
def test_what_needs_a_model_that_is_gone_says_how_to_make_it(folder, finished, tmp_path):
    assert models(finished) == [3]
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    with pytest.raises(
        RedoError,
        match=r"iteration_1/model.*To start from the beginning, run `selm redo .* generate -t 1`",
    ):
        redo(run, "train", 2)
    entries = Stages(run / "iteration_2")
    artifacts.write_json(entries.file, {k: v for k, v in entries.read().items() if k != "score"})
    e = config.load(run / "config.yaml", [("output", str(run))])
    with pytest.raises(ArtifactError, match="'score' of iteration 2 needs.*generate -t 1`"):
        run_stage(Run(e, QUIET), "score", 2)
    redo(run, "generate", 1)
    iterate(Run(e, QUIET))
    assert models(run) == [3] and content(run) == content(finished)


@pytest.mark.slow
def test_the_last_model_can_be_measured_again(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    redo(run, "evaluate", 3)
    e = config.load(run / "config.yaml", [("output", str(run))])
    run_stage(Run(e, QUIET), "evaluate", 3)
    assert content(run) == content(finished)
