"""The mirror of a run folder in a bucket, against a store in memory."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from mortal import Killed, Mortal

from selm_jax.parallel import multihost
from selm_jax.run.held import drop_models
from selm_jax.shell import artifacts, mirror, parts, paths
from selm_jax.shell.digests import digest
from selm_jax.shell.one_process import only_one
from selm_jax.shell.storage import Store
from selm_jax.stages.export import export
from selm_jax.stages.stage import _Call

pa = pytest.importorskip("pyarrow")
obstore = pytest.importorskip("obstore.store")
URL = "gs://bucket/run"


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """bucket(n, machine) -> (the run folder of a new process, its store, killed at write n)."""
    inner = Store(URL, obstore.MemoryStore())
    monkeypatch.setattr(mirror, "_mirrors", {})

    def begin(n: float = float("inf"), machine: str = "one"):
        mirror._mirrors.clear()
        monkeypatch.setenv("SELM_CACHE", str(tmp_path / machine))
        store = Mortal(inner, n)
        monkeypatch.setattr(mirror.Store, "at", lambda url: store)
        folder = mirror.local(URL)
        artifacts.wait_for([folder])
        return folder, store

    begin.inner = inner
    return begin


def fetched(store: Mortal) -> list[str]:
    return sorted(key for name, key in store.made if name == "fetch")


def test_what_one_process_writes_another_machine_reads(bucket):
    folder, _ = bucket()
    artifacts.write_json(folder / "iteration_1/a.json", [1])
    artifacts.write_text(folder / "gone", "x")
    artifacts.remove(folder / "gone")
    there, _ = bucket(machine="two")
    assert there != folder and json.loads((there / "iteration_1/a.json").read_text()) == [1]
    assert not (there / "gone").exists()


def test_files_that_were_never_put_are_gone_and_changed_ones_are_those_of_the_bucket(bucket):
    folder, _ = bucket()
    artifacts.write_text(folder / "a", "of the bucket")
    (folder / "a").write_text("changed here")
    (folder / "iteration_1").mkdir()
    (folder / "iteration_1/half.parquet").write_text("x")
    again, _ = bucket()
    assert again == folder and (folder / "a").read_text() == "of the bucket"
    assert [p.name for p in folder.rglob("*")] == ["a"]


def test_unchanged_files_are_neither_sent_nor_fetched_again(bucket):
    folder, store = bucket()
    artifacts.write_text(folder / "a", "x")
    artifacts.keep(folder / "a")
    assert [call for call in store.made if call[0] == "put"] == [("put", "a")]
    assert fetched(bucket()[1]) == []
    assert fetched(bucket(machine="two")[1]) == ["a"]


def a_model(folder, weights="weights"):
    with artifacts.whole(folder / "iteration_1/model", replaces_folder=True) as partial:
        partial.mkdir()
        (partial / "config.json").write_text("{}")
        (partial / "model.safetensors").write_text(weights)
    return folder / "iteration_1/model"


def test_a_model_is_fetched_when_it_is_read_and_its_digest_is_known_before(bucket):
    here = digest(a_model(bucket()[0]))
    folder, store = bucket(machine="two")
    model = folder / "iteration_1/model"
    assert mirror.exists(model) and mirror.has_files(model) and not model.exists()
    assert digest(model) == here and fetched(store) == []
    assert (mirror.need(model) / "model.safetensors").read_text() == "weights"
    assert len(fetched(store)) == 2
    mirror.need(model)
    assert len(fetched(store)) == 2


def test_without_the_list_of_digests_the_model_is_fetched_and_hashed(bucket):
    here = digest(a_model(bucket()[0]))
    bucket.inner.delete(".mirror/digests.json")
    folder, store = bucket(machine="two")
    assert digest(folder / "iteration_1/model") == here and len(fetched(store)) == 2


def test_a_model_that_several_processes_put_is_known_by_its_digest(bucket):
    """The first process, and whoever comes from another machine, need not fetch it for that."""
    whole = a_model(bucket()[0])
    expected = digest(whole)
    others, _ = bucket(machine="two")
    at = mirror._mirrors.pop(URL)
    first, store = bucket(machine="three")
    with artifacts.whole(first / "iteration_1/model", replaces_folder=True) as partial:
        partial.mkdir()
        (partial / "config.json").write_text("{}")
    assert digest(first / "iteration_1/model") != expected
    model = others / "iteration_1/model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_text("weights")
    told = at.put_parts(model)
    mine = mirror.of(first)
    mine.refresh(first / "iteration_1/model")
    mine.learn(told)
    assert digest(first / "iteration_1/model") == expected
    folder, again = bucket(machine="four")
    assert digest(folder / "iteration_1/model") == expected
    assert fetched(store) == fetched(again) == []
    mirror.need(folder / "iteration_1/model")
    assert (folder / "iteration_1/model/model.safetensors").read_text() == "weights"


def test_a_model_that_another_has_replaced_is_not_taken_for_the_old_one(bucket):
    old = digest(a_model(bucket()[0]))
    new = digest(a_model(bucket(machine="two")[0], "others"))
    folder, _ = bucket()
    assert digest(folder / "iteration_1/model") == new != old
    assert (mirror.need(folder / "iteration_1/model") / "model.safetensors").read_text() == (
        "others"
    )


def test_a_digest_is_not_computed_again_for_a_file_that_was_put(bucket, monkeypatch):
    folder, _ = bucket()
    artifacts.write_text(folder / "a", "x")
    expected = digest(folder / "a")
    monkeypatch.setattr("selm_jax.shell.digests.sha256", lambda file: pytest.fail("it was read"))
    bucket()
    assert digest(folder / "a") == expected


def test_other_processes_see_what_was_put_when_they_wait_for_it(bucket):
    folder, _ = bucket(machine="two")
    others = mirror._mirrors.pop(URL)
    writer, _ = bucket()
    parts.write(writer / "responses/part-00000-of-00001.parquet", pa.table({"x": [1]}))
    mirror._mirrors["others"] = others
    assert not (folder / "responses").exists()
    artifacts.wait_for([folder / "responses"])
    assert parts.is_there(folder / "responses/part-00000-of-00001.parquet")
    with pytest.raises(artifacts.ArtifactError, match="was written by another process") as e:
        artifacts.wait_for([folder / "nothing"], seconds=0)
    assert "must share" not in str(e.value)


def steps(folder):
    """What stages do: parts, a table, a model in two versions, the removal of what is over."""
    stages = artifacts.Stages(folder / "iteration_1")
    table = pa.table({"x": [1, 2]})
    if not stages.is_done("rank", {}, {}):
        stages.begin("rank", {}, {})
        for file in parts.files(folder / "iteration_1/scores", 2):
            if not parts.is_there(file):
                parts.write(file, table)
        artifacts.write_table(folder / "iteration_1/ranked.parquet", table)
        artifacts.remove(folder / "iteration_1/scores")
        outputs = {"ranked.parquet": folder / "iteration_1/ranked.parquet"}
        stages.finish("rank", {}, {}, outputs, {}, 0)
    inputs = {"ranked.parquet": stages.digest("ranked.parquet")}
    if not stages.is_done("export", inputs, {}):
        stages.begin("export", inputs, {})
        with (folder / "metrics.jsonl").open("w") as f:
            f.write("1\n")
        a_model(folder, "first")
        model = a_model(folder, "second")
        artifacts.keep(folder / "metrics.jsonl")
        stages.finish("export", inputs, {}, {"model": model}, {}, 0, logged="of 1")
    stages.digest("model")


def test_killed_before_any_write_it_ends_with_the_same_objects(bucket):
    """For every number of writes; it goes on by turns on the same machine and on a new one."""
    folder, store = bucket()
    steps(folder)
    writes = sum(name in ("put", "delete") for name, _ in store.made)
    expected = contents(bucket.inner)
    assert writes >= 20
    for n in range(1, writes + 1):
        machine = "one" if n % 2 else f"new-{n}"
        for key in bucket.inner.list():
            bucket.inner.delete(key)
        folder, _ = bucket(n, "one")
        with pytest.raises(Killed):
            steps(folder)
        folder, _ = bucket(machine=machine)
        steps(folder)
        assert contents(bucket.inner) == expected, (n, machine)


def contents(store):
    found = {key: store.read(key) for key in store.list() if not key.startswith(".mirror")}
    assert found
    return found


def test_who_looks_at_a_run_at_work_sees_all_that_its_records_tell_of(bucket, monkeypatch):
    """The run finishes a stage between our listing and our reading of stage.json."""
    writer, _ = bucket()
    artifacts.write_text(writer / "stage.json", "nothing")
    at_work = mirror._mirrors[URL]
    reader, store = bucket(machine="two")
    began = []

    def list_then_work(*prefix):
        found = store.inner.list(*prefix)
        if not began:
            began.append(1)
            mirror._mirrors["at work"] = at_work
            artifacts.write_text(writer / "table", "rows")
            artifacts.write_text(writer / "stage.json", "the table is done")
        return found

    monkeypatch.setattr(store, "list", list_then_work, raising=False)
    assert mirror.look(mirror.entered(URL)) == reader
    assert (reader / "stage.json").read_text() == "the table is done"
    assert (reader / "table").read_text() == "rows"


def test_a_process_has_a_mirror_of_its_own(bucket):
    folder, _ = bucket()
    kept = mirror._mirrors.copy()
    assert bucket()[0] != folder
    del kept


@pytest.mark.parametrize("url", ["gs://bucket", "s3://", "gs://bucket/"])
def test_a_whole_bucket_is_no_run_folder(bucket, url):
    with pytest.raises(paths.PathError, match="name a folder in the bucket"):
        mirror.local(url)


def test_people_read_of_the_bucket_and_not_of_its_mirror(bucket):
    folder, _ = bucket()
    assert mirror.named(folder / "iteration_1") == f"{URL}/iteration_1"
    assert mirror.in_words(f"{folder}/a is damaged") == f"{URL}/a is damaged"
    assert mirror.named(folder.parent) == str(folder.parent)


def test_the_log_of_a_server_stays_on_its_machine(bucket):
    """A server that a killed run left behind keeps it locked, and the next run waits for that."""
    folder, store = bucket()
    with (folder / "server.log").open("a") as log:
        log.write("ready")
    again, store = bucket()
    assert again == folder and (folder / "server.log").read_text() == "ready"
    assert mirror.in_words(f"see {folder}/server.log of {folder}") == (
        f"see {folder}/server.log of {URL}"
    )
    with only_one(folder):  # the log alone makes the folder nobody else's
        assert sorted(store.list()) == [".lock", ".selm"]


def test_what_the_first_process_has_removed_takes_no_room_on_other_hosts(bucket, monkeypatch):
    writer, _ = bucket()
    keys = "iteration_1/checkpoints/final/a", "iteration_1/model/b"
    for key in keys:
        artifacts.write_text(writer / key, "parameters")
    folder, _ = bucket(machine="two")
    for key in keys:
        assert mirror.need(folder / key).exists()
        bucket.inner.delete(key)
    monkeypatch.setattr(multihost, "is_first", lambda: False)
    monkeypatch.setattr(multihost, "on_first", lambda work: None)  # it has done so
    run = SimpleNamespace(
        folder=SimpleNamespace(iteration=lambda t: folder / f"iteration_{t}"),
        experiment=SimpleNamespace(keep_models="last", keep_best=None, iterations=2),
    )
    _Call(export, run, 1, {})._clear(("checkpoints",))
    drop_models(run, 2)
    assert not [file for file in folder.rglob("*") if file.is_file()]
    assert not mirror.has_files(folder / "iteration_1/checkpoints")
