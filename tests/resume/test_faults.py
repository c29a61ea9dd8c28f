"""Real faults: a full disk in each stage, damaged files, changed settings, a second run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import runs
import tiny
from rich.console import Console

from selm_jax import cli, config
from selm_jax.iterate import iterate
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.shell.artifacts import ArtifactError

QUIET = Console(quiet=True)


def go(file, *overrides):
    iterate(Run(config.load(file, overrides), QUIET))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """An experiment of one iteration and three updates, on one device."""
    return tiny.experiment(
        tmp_path_factory.mktemp("faults"), output="run", iterations=1, data__limit=16,
        training__learning_rate=[1e-3], compute__preset="single",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(file):
    """The folder of a run without faults. Its name is relative: it stands in some artefacts."""
    where = file.parent / "whole"
    where.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        go(file, "output=run")
    return where / "run"


@pytest.fixture
def small_disk(tmp_path):
    """(folder, fill, empty): a disk of its own where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    filler = folder / "filler"

    def fill():
        with filler.open("wb", buffering=0) as f:
            try:
                while True:
                    f.write(bytes(4096))
            except OSError:
                return

    yield folder, fill, lambda: filler.unlink(missing_ok=True)
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_in_each_stage(file, whole, small_disk, monkeypatch, capsys, tried):
    """The disk fills up when a stage has begun; the run says so, and goes on when there is room."""
    folder, fill, empty = small_disk
    expected = runs.content(whole)
    begin, target = artifacts.Stages.begin, []

    def begin_and_fill(self, stage, *rest):
        begin(self, stage, *rest)
        if target and (self.folder.name, stage) == target[0]:
            fill()

    monkeypatch.setattr(artifacts.Stages, "begin", begin_and_fill)
    monkeypatch.chdir(folder)
    arguments = ["selm", "run", str(file), "output=run"]
    full = [("iteration_0", "evaluate"), *(("iteration_1", s) for s in runs.STAGES)]
    for at in full:
        target[:] = [at]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr().err
        assert left.value.code == 1 and "No space left" in said and "Traceback" not in said, at
        begun = [k for k, v in runs.stages(folder / "run").items() if not v["done"]]
        assert begun == [(int(at[0][-1]), at[1])]
        empty()
    target.clear()
    cli.main()
    tried(f"disk full in {len(full)} stages, one after the other")
    assert not runs.differences(runs.content(folder / "run"), expected)


FAULTS = {
    "a truncated part": (
        "iteration_1/responses/part-00001-of-00003.parquet", "cut",
        "responses is not what it wrote",
    ),
    "a missing part": (
        "iteration_1/responses/part-00001-of-00003.parquet", "remove", "responses is not what it",
    ),
    "a truncated table": ("iteration_1/examples.parquet", "cut", "examples.parquet is not what it"),
    "a truncated model": (
        "iteration_1/model/model.safetensors", "cut", "model is not what it wrote",
    ),
    "a missing model": ("iteration_1/model", "remove", "model is missing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_artefact_is_named(file, whole, tmp_path, fault, tried):
    name, kind, message = FAULTS[fault]
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    path = copy / name
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        artifacts.remove(path)
    with pytest.raises(ArtifactError, match=message):
        go(file, f"output={copy}")
    tried(f"{fault}: refused by name")


def test_a_part_that_was_torn_by_a_crash_is_made_again(file, whole, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    part = copy / "iteration_1/responses/part-00001-of-00003.parquet"
    expected = part.read_bytes()
    part.with_name(f"{part.name}.selm-partial").write_bytes(expected[:100])
    part.unlink()
    stage = artifacts.Stages(copy / "iteration_1")
    entry = stage.read()["generate"]
    stage.begin("generate", entry["inputs"], entry["settings"])
    go(file, f"output={copy}")
    assert part.read_bytes() == expected and not list(copy.rglob("*partial"))


def test_a_changed_setting_is_named_also_of_a_stage_that_only_began(file, whole, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    stage = artifacts.Stages(copy / "iteration_1")
    entry = stage.read()["train"]
    stage.begin("train", entry["inputs"], entry["settings"])
    checkpoint = copy / "iteration_1" / "checkpoints" / "1" / "state"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()  # without one the stage has nothing to go on from, and may begin anew
    with pytest.raises(ArtifactError, match=r"'train': objective.alpha was 0.01 and is now 0.02"):
        go(file, f"output={copy}", "objective.alpha=0.02")


def test_a_changed_reference_is_refused(file, whole, tmp_path):
    """Also where no stage before it is left that would notice: `selm train` alone."""
    from selm_jax.iterate import run_stage

    copy, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(whole, copy)
    shutil.copytree(file.parent / "model", model)
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    artifacts.Stages(copy / "iteration_1").file.unlink()
    run = Run(config.load(file, [f"output={copy}", f"model.source={model}"]), QUIET)
    with pytest.raises(ArtifactError, match="log-probabilities come from the model with digest"):
        run_stage(run, "train", 1)


def test_a_second_process_is_refused_and_the_first_goes_on(file, tmp_path):
    first = runs.start(file, tmp_path / "shared")
    assert runs.wait_for(first, tmp_path / "shared/run", (0, "evaluate")), first.output()
    second = runs.start(file, tmp_path / "shared")
    assert second.wait() == [1], second.output()
    assert "another process" in second.output()
    first.kill()
