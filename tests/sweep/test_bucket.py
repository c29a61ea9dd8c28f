"""A sweep in a bucket: its own files, those of its runs, and what the runs share."""

from __future__ import annotations

import contextlib
import csv
import random
import shutil
from types import SimpleNamespace

import buckets
import pytest
import runs
import tiny
import yaml
from forked import Selm
from mortal import Killed, Life, Mortal
from rich.console import Console

from selm_jax.commands.runs import set_up_jax
from selm_jax.policy import sizes
from selm_jax.report import sweep_page
from selm_jax.run.sizes import room_in
from selm_jax.shell import artifacts, bucket_lock, mirror
from selm_jax.shell.artifacts import ArtifactError
from selm_jax.shell.one_process import only_one
from selm_jax.shell.paths import PathError
from selm_jax.shell.shared_stages import SharedStages
from selm_jax.shell.storage import Store
from selm_jax.sweep import sweep
from selm_jax.sweep.grid import read_sweep

pytest.importorskip("obstore", reason="obstore is not installed: no bucket is tried")
QUIET = Console(quiet=True)


@pytest.fixture
def process(tmp_path, monkeypatch):
    """process(n, machine) begins a process that is killed before its n-th write; gives its life."""
    at = Store.at

    def begin(n: float = float("inf"), machine: str = "one") -> Life:
        life = Life(n)
        monkeypatch.setattr(mirror, "_mirrors", {})
        monkeypatch.setenv("SELM_CACHE", str(tmp_path / "caches" / machine))
        monkeypatch.setattr(Store, "at", lambda url: Mortal(at(url), life=life))
        return life

    yield begin
    monkeypatch.setattr(Store, "at", at)


def sweep_file(folder, output: str, **changes):
    said = {
        "output": output,
        "base": str(tiny.experiment(folder, data__limit=16, **changes)),
        "set": {"iterations": 1, "training.learning_rate": [1e-3]},
        "grid": {"objective.alpha": [0.01, 10]},
        "seeds": [7],
    }
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(said, sort_keys=False))
    return file


def test_a_sweep_and_its_runs_have_mirrors_of_their_own(process, tmp_path):
    process()
    url = f"file://{tmp_path}/bucket/sweep"
    grid = read_sweep(sweep_file(tmp_path, url))
    first, other = (member.folder for member in grid.members)
    assert [m.experiment.output for m in grid.members] == [f"{url}/0.01/seed_7", f"{url}/10/seed_7"]
    with only_one(grid.folder), only_one(first):
        artifacts.write_text(grid.folder / "table.csv", "of the sweep")
        artifacts.write_text(first / "config.yaml", "of a run")
        with pytest.raises(ArtifactError, match="another process"):
            sweep(grid, QUIET)
        process(machine="two")
        again = read_sweep(sweep_file(tmp_path, url))
        mirror.look(again.folder)
        found = sorted(p.name for p in again.folder.rglob("*") if p.is_file())
        assert found == [".selm", "table.csv"]
        assert not again.folder.is_relative_to(grid.folder)
        mirror.look(again.members[0].folder)
        assert (again.members[0].folder / "config.yaml").read_text() == "of a run"
    assert not other.is_relative_to(grid.folder) and not list(other.iterdir())
    above = only_one(mirror.local(url.removesuffix("/sweep")))
    with pytest.raises(PathError, match="sweep/.selm.*was not made by this program"), above:
        pass


def test_what_runs_share_is_whole_however_its_writing_is_killed(process, tmp_path):
    """It is put by one run and taken by another, on another machine."""
    table, folder = tmp_path / "a.txt", tmp_path / "responses"
    table.write_text("a table")
    folder.mkdir()
    for part in ("1", "2"):
        (folder / part).write_text(f"part {part}")
    outputs = {"a.txt": table, "responses": folder}

    def store_and_run(n: int) -> tuple[SharedStages, str]:
        at = mirror.local(f"file://{tmp_path}/bucket-{n}/sweep")
        return SharedStages(mirror.look(at) / "store"), f"file://{tmp_path}/bucket-{n}/sweep/b/1"

    for n in (1, 2, 3, 4, 5):
        life = process(n)
        store, run = store_and_run(n)
        with contextlib.suppress(Killed):
            store.put("key", outputs, {"counts": 3, "run": store.name_of(mirror.local(run))})
        process(machine=f"new-{n}")
        store, run = store_and_run(n)
        taken = store.take("key", mirror.local(run))
        if life.left > 0:
            assert taken == {"counts": 3, "run": "b/1"}
            found = runs.content_of(Store.at(run), tmp_path / "objects")
            assert found == {"a.txt": b"a table"} | {
                f"responses/{part}": f"part {part}".encode() for part in ("1", "2")
            }
        else:
            assert taken is None and not mirror.exists(store.folder / "key")
    assert life.left > 0, "the last one was not killed"


def test_the_page_of_a_sweep_links_the_pages_of_its_runs(process, tmp_path):
    process()
    grid = read_sweep(sweep_file(tmp_path, f"file://{tmp_path}/bucket/sweep"))
    artifacts.write_text(grid.members[0].folder / "report.html", "a page")
    found = sweep_page.with_pages(grid.folder, ["0.01/seed_7", "10/seed_7"])
    assert found == {"0.01/seed_7"}


def test_all_runs_of_a_sweep_get_the_room_of_the_first_also_on_a_new_machine(
    process, tmp_path, monkeypatch
):
    for machine, free in (("one", 7), ("two", 5)):
        process(machine=machine)
        monkeypatch.setattr(sizes, "room", lambda device, free=free: sizes.Room(free, "free"))
        monkeypatch.setattr(sizes, "whole_room", lambda device: 9)
        store = mirror.look(mirror.local(f"file://{tmp_path}/bucket/sweep")) / "store"
        kind = SimpleNamespace(device_kind="a chip")
        assert room_in(SharedStages(store), kind).bytes == 7


@pytest.mark.slow
def test_killed_at_growing_numbers_of_writes_it_ends_as_on_a_disk(
    process, tmp_path, monkeypatch, tried
):
    """Over HTTP; every other attempt is on a new machine."""
    tiny.on_first_device(monkeypatch)
    monkeypatch.setattr(bucket_lock, "held", lambda store: contextlib.nullcontext())
    process()
    set_up_jax()
    file = sweep_file(tmp_path, str(tmp_path / "sweep"), compute__preset="single")
    sweep(read_sweep(file), QUIET)
    expected = runs.content(tmp_path / "sweep")
    with buckets.moto() as proxy:
        url, environment = buckets.new_bucket("s3", proxy)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        output = f"{url}/sweeps/one"
        chance, limit, kills = random.Random(1), 0.0, 0
        while True:
            life = process(limit, machine=f"{kills // 2}")
            try:
                sweep(read_sweep(file, output=output), QUIET)
                break
            except Exception:
                if life.left > 0:
                    raise
            kills += 1
            limit = limit * 3 + chance.randint(1, 9)
        found = runs.content_of(Store.at(output), tmp_path / "objects")
        page = Store.at(output).read("report.html").decode()
        shutil.rmtree(tmp_path / "caches")
    tried(f"a sweep in a bucket: killed before {kills} of its writes")
    cells = ("0.01/seed_7", "10/seed_7")
    it_is_named = {
        f"{c}/{f}" for c in cells for f in ("config.yaml", "iteration_1/model/README.md")
    }
    assert set(runs.differences(found, expected)) == it_is_named | {
        f"{cell}/manifest.json" for cell in cells
    }
    for name in it_is_named:
        there = output.encode()
        assert found[name].replace(there, str(tmp_path / "sweep").encode()) == expected[name]
    for cell in cells:
        assert f'href="{cell}/report.html"' in page
    with (tmp_path / "sweep/table.csv").open() as f:
        assert [row["runs"] for row in csv.DictReader(f)] == ["1", "1"]
    stages = {t: found[f"{cells[1]}/iteration_{t}/stage.json"] for t in (0, 1)}
    shared = {name for entries in stages.values() for name in entries if "shared" in entries[name]}
    assert shared == {"generate", "rank", "score", "evaluate"}


@pytest.mark.slow
def test_two_processes_without_a_common_folder(tmp_path, tried):
    """Killed once in the middle of the first run; the other run takes what that has done."""
    file, url = sweep_file(tmp_path, f"file://{tmp_path}/bucket/sweep"), tmp_path / "bucket/sweep"

    def begin() -> Selm:
        return Selm(
            ["sweep", file, "-o", f"file://{url}", "training.global_batch=2"], folder=tmp_path,
            cache=tmp_path / "cache", processes=2, log=tmp_path / "log",
        )  # fmt: skip

    both = begin()
    assert runs.wait_for(both, url / "0.01/seed_7", (1, "train")), both.output()
    both.kill()
    shutil.rmtree(tmp_path / "cache/runs")
    both = begin()
    assert both.wait() == [0, 0], both.output()
    told = both.output()
    assert "1 of 2: 0.01, seed 7" in told and f"page: file://{url}/report.html" in told
    entries = runs.stages(url / "10/seed_7")
    tried(f"a sweep in a bucket, two processes: {len(entries)} stages of its second run")
    assert all(entry["done"] for entry in entries.values()) and len(entries) == 7
    assert "shared" in entries[1, "generate"] and "shared" not in entries[1, "train"]
    with (url / "table.csv").open() as f:
        assert [row["runs"] for row in csv.DictReader(f)] == ["1", "1"]
