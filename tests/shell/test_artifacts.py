"""A file is written completely or not at all; a stage counts as done only if its record is true."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pytest

from selm_jax.shell import artifacts, loglines
from selm_jax.shell.artifacts import ArtifactError, Stages
from selm_jax.shell.lock import only_one
from selm_jax.shell.sealed import seal, unsealed


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    file = tmp_path / "a.txt"
    artifacts.write_text(file, "old")
    with pytest.raises(RuntimeError), artifacts.whole(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_leftover_of_a_kill_is_replaced(tmp_path):
    folder = tmp_path / "model"
    (tmp_path / "model.selm-partial").mkdir()
    (tmp_path / "model.selm-partial" / "torn").write_text("x")
    with artifacts.whole(folder) as partial:
        partial.mkdir()
        (partial / "new").write_text("y")
    assert [p.name for p in folder.iterdir()] == ["new"]


def test_a_link_to_the_file_that_is_there_leaves_nothing_beside_it(tmp_path):
    """Renaming one hard link of a file over another does nothing, without an error."""
    file = tmp_path / "a"
    file.write_text("x")
    with artifacts.whole(file) as partial:
        partial.hardlink_to(file)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_digest_sees_content_and_names(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text("1")
    one = artifacts.digest(tmp_path / "a")
    assert one == artifacts.digest(tmp_path / "b")
    (tmp_path / "b" / "f").rename(tmp_path / "b" / "g")
    assert one != artifacts.digest(tmp_path / "b")
    (tmp_path / "a" / "f").write_text("2 ")
    assert one != artifacts.digest(tmp_path / "a")


def test_a_stage_is_done_while_its_record_is_true(tmp_path):
    stages = Stages(tmp_path)
    out = tmp_path / "out"
    inputs, settings = {"in": "abc"}, {"beta": 0.1}
    assert not stages.is_done("train", inputs, settings)
    stages.begin("train", inputs, settings)
    assert not stages.is_done("train", inputs, settings)
    artifacts.write_text(out, "result")
    stages.finish("train", inputs, settings, {"out": out}, {"updates": 3}, 1.0)
    assert stages.is_done("train", inputs, settings)
    with pytest.raises(ArtifactError, match=r"beta was 0\.1 and is now 0\.2"):
        stages.is_done("train", inputs, {"beta": 0.2})
    with pytest.raises(ArtifactError, match="gamma was None and is now 1"):
        stages.is_done("train", inputs, settings | {"gamma": 1})
    with pytest.raises(ArtifactError, match="its input in has changed"):
        stages.is_done("train", {"in": "abd"}, settings)
    artifacts.write_text(out, "another")
    with pytest.raises(ArtifactError, match="is not what it wrote"):
        stages.is_done("train", inputs, settings)


def test_an_entry_of_an_earlier_version_is_compared_by_what_it_has(tmp_path):
    """It kept fewer inputs and settings; those that it kept must still be the same."""
    stages = Stages(tmp_path)
    stages.begin("train", {"in": "abc"}, {"beta": 0.1})
    stages.finish("train", {"in": "abc"}, {"beta": 0.1}, {}, {}, 1.0)
    entry = unsealed(stages.read()["train"])
    assert entry.pop("format") == artifacts.FORMAT
    stages.file.write_text(json.dumps({"train": seal(entry, "train")}))
    assert stages.is_done("train", {"in": "abc", "more": "x"}, {"beta": 0.1, "gamma": 1})
    with pytest.raises(ArtifactError, match=r"beta was 0\.1 and is now 0\.2"):
        stages.is_done("train", {"in": "abc", "more": "x"}, {"beta": 0.2, "gamma": 1})
    with pytest.raises(ArtifactError, match="its input in has changed"):
        stages.is_done("train", {"in": "abd", "more": "x"}, {"beta": 0.1})


def test_a_stage_that_began_does_not_go_on_with_other_settings(tmp_path):
    stages = Stages(tmp_path)
    stages.begin("generate", {}, {"temperature": 1.0})
    with pytest.raises(ArtifactError, match="temperature"):
        stages.is_done("generate", {}, {"temperature": 0.7})


def test_lines_are_dropped_by_condition_and_when_torn(tmp_path):
    file = tmp_path / "m.jsonl"
    for step in range(4):
        loglines.append_line(file, {"step": step})
    with file.open("a") as f:
        f.write('{"step": 4, "lo')
    loglines.rewrite_lines(file, lambda line: line["step"] < 2)
    assert [json.loads(x)["step"] for x in file.read_text().splitlines()] == [0, 1]


def test_one_process_at_a_time(tmp_path):
    with only_one(tmp_path), pytest.raises(ArtifactError, match="another process"):
        only_one(tmp_path).__enter__()
    with only_one(tmp_path):
        pass


LEFTOVERS = [".DS_Store", "._part", "Thumbs.db", "desktop.ini", ".nfs00000a1", "below/.DS_Store"]


@pytest.fixture
def done(tmp_path):
    """A finished stage with a folder of two files, and what asks whether it is done."""
    stages, out = Stages(tmp_path / "iteration_1"), tmp_path / "iteration_1" / "responses"
    for name in ("a", "below/b"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    stages.finish("generate", {}, {}, {"responses": out}, {}, 1.0)
    return out, lambda: stages.is_done("generate", {}, {})


@pytest.mark.parametrize("name", LEFTOVERS)
def test_what_the_system_leaves_in_a_folder_does_not_count(done, name):
    out, is_done = done
    (out / name).write_text("x")
    assert is_done()


def test_a_message_names_the_files_that_are_new_missing_or_changed(done):
    out, is_done = done
    (out / "notes.txt").write_text("a person's")
    with pytest.raises(ArtifactError, match=r"responses is not what it wrote \(new: notes.txt\)"):
        is_done()
    (out / "a").rename(out / "below" / "c")
    (out / "below" / "b").write_text("B!")
    told = (
        r"\(new: below/c, notes.txt; missing: a; changed: below/b\)\. .* restore the original files"
    )
    with pytest.raises(ArtifactError, match=told):
        is_done()
    for i in range(7):
        (out / f"x{i}").write_text("")
    with pytest.raises(ArtifactError, match=r"notes.txt, x0, x1, x2 and 4 more; missing: a"):
        is_done()


def test_the_digest_of_a_folder_is_that_of_its_files(done):
    """So run folders that record it alone are read as before."""
    out, _ = done
    lines = "".join(f"{n} {hashlib.sha256(n.encode()).hexdigest()}\n" for n in ("a", "below/b"))
    assert artifacts.digest(out) == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize("name", ["a:b", "s3:x", "file:x", "hdfs:x", "a[1]", "a\\b", "~x"])
def test_a_table_in_a_folder_of_any_name(name, tmp_path, monkeypatch):
    """To pyarrow, a relative path such as `s3:x` is an address."""
    monkeypatch.chdir(tmp_path)
    artifacts.write_table(Path(name) / "t.parquet", pa.table({"a": [1]}))
    assert [str(p) for p in Path().rglob("*.parquet")] == [f"{name}/t.parquet"]
