"""A run in a bucket ends with the bytes of a local run, also if it is killed before its writes."""

from __future__ import annotations

import contextlib
import random
import shutil

import buckets
import pytest
import runs
import tiny
from mortal import Mortal
from rich.console import Console

from selm_jax import config
from selm_jax.commands.redo import redo
from selm_jax.commands.runs import set_up_jax
from selm_jax.feedback.ranker import FeedbackError
from selm_jax.iterate import iterate
from selm_jax.run.run import Run
from selm_jax.shell import bucket_lock, mirror
from selm_jax.shell.artifacts import ArtifactError
from selm_jax.shell.one_process import only_one
from selm_jax.shell.paths import PathError
from selm_jax.shell.storage import Store

stores = pytest.importorskip("obstore.store")
pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
URL = "gs://bucket/run"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache for all tests here, so that they compile the programs once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(cache, tmp_path, monkeypatch):
    """run(bucket, n) runs the experiment in this bucket until it ends or is killed."""
    file = tiny.experiment(
        tmp_path, output=URL, iterations=1, data__limit=16, training__learning_rate=[1e-3],
        compute__preset="single",
    )  # fmt: skip
    tiny.on_first_device(monkeypatch)
    monkeypatch.setenv("SELM_CACHE", str(cache))
    monkeypatch.setattr(mirror, "_mirrors", {})
    monkeypatch.setattr(bucket_lock, "held", lambda store: contextlib.nullcontext())
    monkeypatch.setattr("selm_jax.run.programs.is_url", lambda url: False)  # it is in memory
    set_up_jax()

    def begin(bucket: Store, n: float = float("inf")) -> bool:
        mirror._mirrors.clear()
        store = Mortal(bucket, n)
        monkeypatch.setattr(Store, "at", lambda url: store)
        try:
            iterate(Run(config.load(file), QUIET))
        except Exception:
            if store.left > 0:
                raise
        return store.left > 0

    return begin


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_growing_numbers_of_writes(run, seed, tmp_path, tried):
    """Every attempt goes on where the last one was killed; each may make a few writes more."""
    whole, bucket = (Store(URL, stores.MemoryStore()) for _ in range(2))
    assert run(whole)
    chance, limit, kills = random.Random(seed), 0.0, 0
    while not run(bucket, limit):
        kills += 1
        limit = limit * 1.2 + chance.randint(1, 9)
    tried(f"one process in a bucket: killed before {kills} of its writes, seed {seed}")
    expected = runs.content_of(whole, tmp_path / "whole")
    assert not runs.differences(runs.content_of(bucket, tmp_path / "killed"), expected)


@pytest.mark.parametrize("server", [buckets.moto, buckets.google])
def test_a_run_of_two_iterations_over_http(server, tmp_path, monkeypatch, capsys, tried):
    """Against S3 and Google's store; while a process is at work there, another is refused."""
    kind = "s3" if server is buckets.moto else "gs"
    file = tiny.experiment(tmp_path, output="run", data__limit=16, compute__preset="single")
    tiny.on_first_device(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SELM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mirror, "_mirrors", {})
    iterate(Run(config.load(file), QUIET))
    with server() as proxy:
        url, environment = buckets.new_bucket(kind, proxy)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        output = f"{url}/runs/run"
        iterate(Run(config.load(file, [f"output={output}"]), QUIET))
        tried(f"{kind}: a run of two iterations with {len(proxy.asked)} requests")
        store = Store.at(output)
        found = runs.content_of(store, tmp_path / "found")
        assert mirror.look(mirror.entered(output)).is_relative_to(tmp_path / "cache")
        at_work = only_one(mirror.local(output))
        with at_work, pytest.raises(ArtifactError, match=f"{output}: another"):
            iterate(Run(config.load(file, [f"output={output}"]), QUIET))
        lines = redo(mirror.look(mirror.entered(output)), "export", 2)
        assert lines == ["iteration 2  evaluate: forgotten", "iteration 2  export: forgotten",
                         "iteration 2  train: forgotten"]  # fmt: skip
        assert not [key for key in store.list() if "iteration_2/model" in key]
        mirror._mirrors.clear()
        shutil.rmtree(tmp_path / "cache/runs")  # as on another machine
        iterate(Run(config.load(file, [f"output={output}"]), QUIET))
        assert not runs.differences(runs.content_of(store, tmp_path / "again"), found)
    expected = runs.content(tmp_path / "run")
    names_it = {"config.yaml", *(f"iteration_{t}/model/README.md" for t in (1, 2))}
    assert set(runs.differences(found, expected)) == {*names_it, "manifest.json"}
    for name in names_it:
        assert found[name].replace(output.encode(), b"run") == expected[name]


def test_a_folder_of_others_and_a_database_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "_mirrors", {})
    monkeypatch.setenv("SELM_CACHE", str(tmp_path / "cache"))
    bucket = Store(URL, stores.MemoryStore())
    monkeypatch.setattr(Store, "at", lambda url: bucket)
    bucket.put("theirs.txt", b"x")
    file = tiny.experiment(tmp_path, output=URL, feedback__ranker="human")
    with pytest.raises(PathError, match="theirs.txt.*was not made by this program"):
        iterate(Run(config.load(file), QUIET))
    bucket.delete("theirs.txt")
    with pytest.raises(FeedbackError, match="feedback.settings.store"):
        iterate(Run(config.load(file), QUIET))
