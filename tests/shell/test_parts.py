"""Parts of tables and JSON with its own digest are read unchanged, or refused by name."""

from __future__ import annotations

import hashlib
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selm_jax.shell import artifacts, parts
from selm_jax.shell.artifacts import ArtifactError

TABLE = pa.table({"n": [1, 2, 3], "text": ["a", "b", "c"]})


def flipped(data: bytes, bit: int) -> bytes:
    data = bytearray(data)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def test_a_part_is_there_when_it_and_its_digest_are(tmp_path):
    (file,) = parts.files(tmp_path, 1)
    assert not parts.is_there(file)
    parts.write(file, TABLE)
    assert parts.is_there(file) and artifacts.read_table(file) == TABLE
    (beside,) = tmp_path.glob(".*.sha256")
    assert beside.read_text() == f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
    assert pq.read_table(tmp_path) == TABLE  # the folder is one table to others
    beside.unlink()
    assert not parts.is_there(file)


def test_a_kill_while_a_part_is_written_anew_leaves_none_or_a_whole_one(tmp_path, monkeypatch):
    """The part of another ranker lies there, so that its digest is not that of the new one."""
    (file,) = parts.files(tmp_path, 1)
    write = artifacts.whole
    for step in range(2):
        monkeypatch.undo()
        parts.write(file, TABLE)
        count = [0]

        def dies(path, *args, step=step, count=count, **kwargs):
            count[0] += 1
            if count[0] > step:
                raise KeyboardInterrupt
            return write(path, *args, **kwargs)

        monkeypatch.setattr(artifacts, "whole", dies)
        with pytest.raises(KeyboardInterrupt):
            parts.write(file, TABLE.slice(1))
        assert not parts.is_there(file)


def test_every_flipped_bit_of_a_part_or_its_digest_is_refused(tmp_path):
    (file,) = parts.files(tmp_path, 1)
    parts.write(file, TABLE)
    (beside,) = tmp_path.glob(".*.sha256")
    for path in (file, beside):
        whole = path.read_bytes()
        for bit in range(0, 8 * len(whole), 29):
            path.write_bytes(flipped(whole, bit))
            with pytest.raises(ArtifactError, match=f"{file.name}: .*Delete the part"):
                parts.is_there(file)
        path.write_bytes(whole)
    assert parts.is_there(file)


def test_a_flipped_bit_in_a_page_is_found_without_a_digest(tmp_path):
    """`selm report` and others read tables of folders whose stage.json is not there."""
    file = tmp_path / "x.parquet"
    artifacts.write_table(file, pa.table({"n": list(range(1000))}))
    whole = file.read_bytes()
    group = pq.ParquetFile(file).metadata.row_group(0).column(0)
    start, size = group.dictionary_page_offset, group.total_compressed_size
    expected, noticed = pq.read_table(file), 0
    for at in range(start + size // 2, start + size // 2 + 20):
        file.write_bytes(flipped(whole, 8 * at))
        with pytest.raises(ArtifactError, match=r"x.parquet: this table is damaged"):
            artifacts.read_table(file)
        noticed += 1
    file.write_bytes(whole)
    assert noticed == 20 and artifacts.read_table(file) == expected


def test_every_flipped_bit_of_sealed_json_is_refused(tmp_path):
    file = tmp_path / "manifest.json"
    value = {"name": "é", "counts": {"1": 1.5, "b": [True, None]}}
    artifacts.write_sealed(file, value)
    assert artifacts.read_sealed(file) == value
    whole, unnoticed = file.read_bytes(), []
    for bit in range(0, 8 * len(whole), 3):
        file.write_bytes(flipped(whole, bit))
        try:
            unnoticed.append((bit, artifacts.read_sealed(file)))
        except ArtifactError as e:
            # "is not" JSON or UTF-8
            assert re.search("manifest.json: this file (has changed|is not) ", str(e))
    # None in the text; the new line at the end may become another space.
    assert all(bit // 8 == len(whole) - 1 and found == value for bit, found in unnoticed)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", "null", "\0\xff", '\ufeff{"a": 1}'])
def test_a_record_that_is_no_json_object_is_named(tmp_path, text):
    file = tmp_path / "stage.json"
    file.write_bytes(text.encode("utf-8" if text.startswith("\ufeff") else "latin-1"))
    for read in (artifacts.Stages(tmp_path).read, lambda: artifacts.read_sealed(file)):
        with pytest.raises(ArtifactError, match="stage.json: this file .*Restore it") as found:
            read()
        assert len(str(found.value)) < len(str(file)) + 200


@pytest.mark.parametrize("done", [False, True])
def test_every_flipped_bit_of_a_stage_is_refused_and_a_stage_may_be_taken_out(tmp_path, done):
    record = artifacts.Stages(tmp_path)
    record.begin("generate", {"policy": "abc"}, {"seed": 3})
    if done:
        record.finish("generate", {"policy": "abc"}, {"seed": 3}, {}, {"prompts": 4}, 1.25)
    record.begin("rank", {}, {"seed": 3})
    whole = record.file.read_bytes()
    for bit in range(0, 8 * len(whole) - 8, 23):
        record.file.write_bytes(flipped(whole, bit))
        with pytest.raises(ArtifactError, match="stage.json: "):
            record.read()
    record.file.write_bytes(whole)
    left = {k: v for k, v in json.loads(whole).items() if k != "generate"}
    record.file.write_text(json.dumps(left))
    assert list(record.read()) == ["rank"]


def test_an_input_that_is_not_what_its_stage_wrote_is_named(tmp_path):
    """Also where the stage that wrote it is not asked: `selm rank` alone."""
    file = tmp_path / "ranked.parquet"
    artifacts.write_table(file, TABLE)
    record = artifacts.Stages(tmp_path)
    assert record.digest(file.name) == artifacts.digest(file)  # nobody has said anything of it
    record.finish("rank", {}, {}, {file.name: file}, {}, 0.0)
    assert record.digest(file.name) == artifacts.digest(file)
    artifacts.write_table(file, TABLE.slice(1))
    with pytest.raises(ArtifactError, match=r"ranked.parquet has changed since stage 'rank' wrote"):
        record.digest(file.name)
