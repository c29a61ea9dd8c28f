"""Kinds of files and folders: each reads as the same rows in JSON lines."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selm_jax.shell.storage import Store
from selm_jax.text.prompts import DataError, load_prompts
from selm_jax.text.tables import kind_of

ROWS = [
    {"prompt_id": f"p{i}", "prompt": f'Say "{i}",\tplease\n\u2028now.', "chosen": "Ja é.",
     "rejected": "No.", "note": f"n{i}"}
    for i in range(5)
]  # fmt: skip


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def separated(rows, delimiter) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def arrow(rows, opened) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with opened(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def parquet(rows) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


TEXTS = {
    ".jsonl": jsonl,
    ".json": lambda rows: json.dumps(rows).encode(),
    ".csv": lambda rows: separated(rows, ","),
    ".tsv": lambda rows: separated(rows, "\t"),
}
KINDS = {
    **TEXTS,
    **{
        f"{kind}.gz": lambda rows, write=write: gzip.compress(write(rows))
        for kind, write in TEXTS.items()
    },
    ".parquet": parquet,
    ".arrow": lambda rows: arrow(rows, pa.ipc.new_file),
    "_stream.arrow": lambda rows: arrow(rows, pa.ipc.new_stream),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_reads_the_same(tmp_path, kind):
    (tmp_path / "rows.jsonl").write_bytes(jsonl(ROWS))
    expected = list(load_prompts(str(tmp_path / "rows.jsonl")))
    assert [p.row for p in expected] == [{"note": f"n{i}"} for i in range(5)]
    (tmp_path / f"x{kind}").write_bytes(KINDS[kind](ROWS))
    assert list(load_prompts(str(tmp_path / f"x{kind}"))) == expected
    # And in shards of a folder, with a digest in their names as the Hub's older files have it.
    folder = tmp_path / "folder" / "data"
    folder.mkdir(parents=True)
    for i, rows in enumerate((ROWS[:2], ROWS[2:])):
        kind_alone = kind.removeprefix("_stream")
        file = folder / f"train-{i:05d}-of-00002-a09b74b3ef9c3b5{i}{kind_alone}"
        file.write_bytes(KINDS[kind](rows))
    assert list(load_prompts(str(tmp_path / "folder"), split="train")) == expected
    file.unlink()
    with pytest.raises(DataError, match="complete set of shards"):
        load_prompts(str(tmp_path / "folder"), split="train")


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_what_datasets_saves_to_disk(tmp_path, split):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_list(ROWS)
    if split is None:
        whole.save_to_disk(tmp_path / "saved", num_shards=3)
        numbers = range(5)
    else:
        parts = {"train": whole.select([4, 0, 2]), "test": whole.select([1])}
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
        numbers = {"train": [4, 0, 2], "test": [1]}[split]
        with pytest.raises(DataError, match=r"several splits: test, train.*data\.train_split"):
            load_prompts(str(tmp_path / "saved"))
        with pytest.raises(DataError, match=r"no split 'trian'; did you mean 'train'\?"):
            load_prompts(str(tmp_path / "saved"), split="trian")
    found = load_prompts(str(tmp_path / "saved"), split=split)
    assert [p.id for p in found] == [f"p{i}" for i in numbers]
    assert [p.messages[0].content for p in found] == [ROWS[i]["prompt"] for i in numbers]


def test_a_saved_folder_that_is_not_whole(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    folder = tmp_path / "saved"
    with pytest.raises(DataError, match="is a single saved dataset, so it has no split 'train'"):
        load_prompts(str(folder), split="train")
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(
        DataError, match=r"data-00001-of-00002.arrow is named in state.json, but mis"
    ):
        load_prompts(str(folder))
    for state in ("[]", "{", '{"_data_files": 3, "_split": null}', '{"_data_files": []}'):
        (folder / "state.json").write_text(state)
        with pytest.raises(
            DataError, match=r"state\.json: not in the form that Dataset\.save_to_disk writes"
        ):
            load_prompts(str(folder))
    # Its names lead nowhere else.
    (tmp_path / "x.arrow").write_bytes(KINDS[".arrow"](ROWS))
    away = {"_data_files": [{"filename": "../x.arrow"}], "_split": None}
    (folder / "state.json").write_text(json.dumps(away))
    with pytest.raises(DataError, match=r"x\.arrow is named in state\.json, but missing"):
        load_prompts(str(folder))


def test_long_cells(tmp_path):
    rows = [{"prompt": "x" * 200_000, "note": 'y"' * 100_000}]
    for kind in (".csv", ".tsv"):
        (tmp_path / f"x{kind}").write_bytes(TEXTS[kind](rows))
        (one,) = load_prompts(str(tmp_path / f"x{kind}"))
        assert one.messages[0].content == rows[0]["prompt"] and one.row["note"] == rows[0]["note"]


def test_files_that_are_damaged(tmp_path):
    no_text = pa.StringArray.from_buffers(
        1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")
    )
    whole = gzip.compress(jsonl(ROWS))
    cases = {
        "cut.jsonl.gz": (whole[:-20], "cannot be unpacked"),
        "plain.jsonl.gz": (jsonl(ROWS), "cannot be unpacked"),
        "flipped.csv.gz": (
            whole[:30] + bytes([whole[30] ^ 255]) + whole[31:],
            "cannot be unpacked",
        ),
        "x.arrow": (b"ARROW1\0\0 but not really", "cannot be read as arrow"),
        "cut.arrow": (KINDS[".arrow"](ROWS)[:-30], "cannot be read as arrow"),
        "empty.arrow": (b"", "cannot be read as arrow"),
        "bytes.parquet": (parquet([]), "no usable row: read 0"),
        "x.parquet.gz": (gzip.compress(parquet(ROWS)), "unknown file type"),
    }  # fmt: skip
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.*{message}"):
            load_prompts(str(tmp_path / name))
    pq.write_table(pa.table({"prompt": no_text}), tmp_path / "bytes.parquet")
    with pytest.raises(DataError, match="bytes.parquet: a text after row 0 is not UTF-8"):
        load_prompts(str(tmp_path / "bytes.parquet"))


def test_names():
    kinds = {"a.jsonl": ".jsonl", "a.b.csv.gz": ".csv", "a.gz": None, "a.parquet.gz": None,
             "owner/a.tsv": ".tsv", "a.txt": None, "gz": None, "v1.5": None}  # fmt: skip
    assert {name: kind_of(name) for name in kinds} == kinds


# The Hub: which configuration, and no code of a data set's.


def test_a_configuration_is_named(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)

    def load_dataset(path, name=None, split=None, revision=None):
        if name is None:
            raise ValueError("Config name is missing.\nPlease pick one among ['main', 'socratic']")
        return datasets.Dataset.from_list([{"prompt": f"{path} {name} {split} {revision}"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (one,) = load_prompts("openai/gsm8k", config="main", split="train", revision="abc")
    assert one.messages[0].content == "openai/gsm8k main train abc"
    with pytest.raises(DataError, match=r"(?s)'main', 'socratic'.*Name one as data.train_config"):
        load_prompts("openai/gsm8k", split="train")
    (tmp_path / "x.jsonl").write_bytes(jsonl(ROWS))
    with pytest.raises(DataError, match="local path, which has no configuration 'main'"):
        load_prompts(str(tmp_path / "x.jsonl"), config="main")


def test_a_data_sets_own_program_does_not_run(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "here" / "set"
    folder.mkdir(parents=True)
    (folder / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (folder / "train.jsonl").write_bytes(jsonl(ROWS))
    assert len(load_prompts(str(folder))) == 5  # as a folder of files
    real = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, *a, **k: real(str(folder / "set.py"), *a, **k)
    )
    with pytest.raises(DataError, match="owner/set: .*scripts are no longer supported"):
        load_prompts("owner/set", split="train")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_data_in_a_bucket_reads_as_on_the_disk(bucket, faults, tmp_path, monkeypatch):
    monkeypatch.setenv("SELM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    (folder / "train.jsonl").write_bytes(jsonl(ROWS))
    (folder / "test.parquet").write_bytes(parquet(ROWS[:2]))
    (folder / "more" / "notes.txt").write_text("no data")
    store = Store.at(f"{bucket}/sets/mine")
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        store.put(file.relative_to(folder).as_posix(), file)
    for split in ("train", "test"):
        assert list(load_prompts(store.url, split=split)) == list(
            load_prompts(str(folder), split=split)
        )
    file = f"{store.url}/train.jsonl"
    before = list(load_prompts(file))
    assert before == list(load_prompts(str(folder / "train.jsonl")))
    faults.asked.clear()
    assert list(load_prompts(file)) == before
    assert all(method == "HEAD" or "list-type" in path for method, path in faults.asked)
    store.put("train.jsonl", b'{"prompt": 1}\n')
    with pytest.raises(DataError, match=rf"^{file}, row 1 \(line 1\)"):
        load_prompts(file)
    with pytest.raises(DataError, match=f"{store.url}: no split 'dev'"):
        load_prompts(store.url, split="dev")
    with pytest.raises(DataError, match="mine/nothing: there is no such data in the bucket"):
        load_prompts(f"{store.url}/nothing")
