"""Loads prompts: every format, every kind of bad row, portions, digests, the quickstart's data."""

from __future__ import annotations

import collections
import csv
import difflib
import hashlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selm_jax.text.prompts import DataError, Message, Prompt, load_prompts, portion, prompts_digest

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "experiments" / "data"
ALPACA = ROOT.parent / "shared" / "data" / "alpaca_prefs"

SYSTEM, USER, ANSWER = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is the soup?"},
    {"role": "assistant", "content": "Hot."},
)
AGAIN = {"role": "user", "content": "And the bread?"}


def said(text):
    return {"content": text, "role": "assistant"}  # UltraFeedback's key order


def turns(*messages):
    return tuple(Message(m["role"], m["content"]) for m in messages)


def write(path, rows):
    """The obvious writer of each kind, as the oracle of the readers."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), "utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        with path.open("w", encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


KINDS = [".jsonl", ".json", ".parquet", ".csv"]
FORMATS = {
    "prompt only": ({"prompt": "How is the soup?"}, turns(USER), None, None),
    "prompt messages": ({"prompt": [SYSTEM, USER]}, turns(SYSTEM, USER), None, None),
    "explicit strings": (
        {"prompt": "How is the soup?", "chosen": "Good.", "rejected": "Bad."},
        turns(USER), "Good.", "Bad.",
    ),
    "explicit messages": (
        {"prompt": [USER, ANSWER, AGAIN], "chosen": [said("Good.")], "rejected": [said("Bad.")]},
        turns(USER, ANSWER, AGAIN), "Good.", "Bad.",
    ),
    "string prompt, message answers": (
        {"prompt": "How is the soup?", "chosen": [said("Good.")], "rejected": [said("Bad.")]},
        turns(USER), "Good.", "Bad.",
    ),
    "ultrafeedback": (
        {
            "prompt": "How is the soup?",
            "chosen": [USER, said("Good.")],
            "rejected": [USER, said("Bad.")],
            "messages": [USER, said("Good.")],
        },
        turns(USER), "Good.", "Bad.",
    ),
    "ultrafeedback, many turns": (
        {
            "prompt": "How is the soup?\n",
            "chosen": [SYSTEM, USER, ANSWER, AGAIN, said("Good.")],
            "rejected": [SYSTEM, USER, ANSWER, AGAIN, said("Bad.")],
        },
        turns(SYSTEM, USER, ANSWER, AGAIN), "Good.", "Bad.",
    ),
    "implicit prompt": (
        {"chosen": [USER, ANSWER, AGAIN, said("Good.")],
         "rejected": [USER, ANSWER, AGAIN, said("Bad.")]},
        turns(USER, ANSWER, AGAIN), "Good.", "Bad.",
    ),
    "chosen alone": (
        {"prompt": "How is the soup?", "chosen": "Good."}, turns(USER), "Good.", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name, kind):
    row, messages, chosen, rejected = FORMATS[name]
    if kind == ".csv" and not all(isinstance(v, str) for v in row.values()):
        pytest.skip("a CSV cell holds text alone")
    file = write(tmp_path / f"x{kind}", [{**row, "prompt_id": "a", "source": "s"}])
    found = load_prompts(file)
    more = {"messages": row["messages"]} if "messages" in row else {}
    assert list(found) == [Prompt("a", messages, chosen, rejected, {"source": "s", **more})]
    assert found.dropped == {}


def test_columns_by_name_and_those_that_go_along(tmp_path):
    row = {"q": "Hello?", "key": 7, "win": "yes", "lose": "no", "n": 1, "f": 0.5, "ok": True,
           "none": None, "tags": ["x"], "prompt_id": "kept as a value"}  # fmt: skip
    file = write(tmp_path / "x.jsonl", [row])
    (one,) = load_prompts(file, prompt="q", prompt_id="key", chosen="win", rejected="lose")
    values = {key: row[key] for key in ("n", "f", "ok", "none", "tags", "prompt_id")}
    assert one == Prompt("7", turns({"role": "user", "content": "Hello?"}), "yes", "no", values)


def test_a_system_message_may_be_empty(tmp_path):
    silent = {"role": "system", "content": ""}
    file = write(tmp_path / "x.jsonl", [{"prompt": [silent, USER]}])
    assert load_prompts(file)[0].messages == turns(silent, USER)


def test_dates_of_parquet_become_text(tmp_path):
    table = pa.table({"prompt": ["x"], "day": pa.array([0], pa.date32())})
    pq.write_table(table, tmp_path / "x.parquet")
    (one,) = load_prompts(str(tmp_path / "x.parquet"))
    assert one.row == {"day": "1970-01-01"}


def test_null_keys_of_parquet_messages_are_not_extra_keys(tmp_path):
    rows = [{"prompt": [{**USER, "name": None}]}, {"prompt": [{**AGAIN, "name": "Ann"}]}]
    file = write(tmp_path / "x.parquet", rows)
    found = load_prompts(file, on_bad_row="drop")
    assert [p.messages for p in found] == [turns(USER)] and found.dropped == {"bad message": (2,)}


def test_id_without_a_column_is_stable_and_of_the_messages_alone(tmp_path):
    rows = [{"prompt": "How is the soup?", "n": 1}, {"prompt": [SYSTEM, USER], "n": 2}]
    ids = [p.id for p in load_prompts(write(tmp_path / "x.json", rows))]
    text = '[["system","Be brief."],["user","How is the soup?"]]'
    assert ids[1] == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert ids[0] != ids[1]
    other = {"prompt": "How is the soup?", "chosen": "a", "rejected": "b"}
    assert load_prompts(write(tmp_path / "y.jsonl", [other]))[0].id == ids[0]


UF = FORMATS["ultrafeedback"][0]
BAD = {
    # name: (good row before, bad row, reason, column, a word of the detail)
    "blank prompt": ({"prompt": "x"}, {"prompt": " \n"}, "empty prompt", "prompt", "text"),
    "null prompt": ({"prompt": "x"}, {"prompt": None}, "empty prompt", "prompt", "null"),
    "no messages": ({"prompt": "x"}, {"prompt": []}, "empty prompt", "prompt", "no message"),
    "blank turn": (
        {"prompt": "x"}, {"prompt": [{"role": "user", "content": ""}]},
        "empty prompt", "prompt", "message 1",
    ),
    "blank prompt of a pair": (UF, {**UF, "prompt": ""}, "empty prompt", "prompt", "''"),
    "a key is missing": ({"prompt": "x"}, {"promt": "y"}, "missing column", "prompt", "promt"),
    "a number": ({"prompt": "x"}, {"prompt": 3}, "wrong type", "prompt", "3"),
    "ends with the assistant": (
        {"prompt": "x"}, {"prompt": [USER, ANSWER]},
        "last message not a user turn", "prompt", "assistant",
    ),
    "ShareGPT": (
        {"prompt": "x"}, {"prompt": [{"from": "human", "value": "hi"}]},
        "bad message", "prompt", "role and content",
    ),
    "unknown role": (
        {"prompt": "x"}, {"prompt": [{"role": "human", "content": "hi"}]},
        "bad message", "prompt", "'human'",
    ),
    "tool call": (
        {"prompt": "x"}, {"prompt": [{**USER, "tool_calls": [1]}]},
        "bad message", "prompt", "tool_calls",
    ),
    "image parts": (
        {"prompt": "x"}, {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        "bad message", "prompt", "list",
    ),
    "blank answer": (
        UF,
        {**UF, "rejected": [USER, said("")]},
        "empty response",
        "rejected",
        "text",
    ),
    "null answer": (UF, {**UF, "chosen": None}, "empty response", "chosen", "null"),
    "no answer": (UF, {**UF, "rejected": [USER]}, "no assistant answer", "rejected", "assistant"),
    "equal answers": (
        UF, {**UF, "rejected": [USER, said("Good. ")]},
        "chosen equals rejected", "rejected", "'Good.'",
    ),
    "other prompt in the rejected conversation": (
        UF, {**UF, "rejected": [AGAIN, said("Bad.")]}, "prompt mismatch", "rejected", "'chosen'",
    ),
    "one side is only the answer": (
        UF, {**UF, "rejected": "Bad."}, "prompt mismatch", "rejected", "'chosen'",
    ),
    "prompt column is another prompt": (
        UF, {**UF, "prompt": "Why?"}, "prompt mismatch", "prompt", "'chosen'",
    ),
    "prompt messages are another prompt": (
        UF, {**UF, "prompt": [AGAIN]}, "prompt mismatch", "prompt", "'chosen'",
    ),
    "null id": (
        {"prompt": "x", "prompt_id": "a"}, {"prompt": "y", "prompt_id": None},
        "missing id", "prompt_id", "null",
    ),
    "id is a fraction": (
        {"prompt": "x", "prompt_id": "a"}, {"prompt": "y", "prompt_id": 1.5},
        "missing id", "prompt_id", "1.5",
    ),
    "id is a truth value": (
        {"prompt": "x", "prompt_id": "a"}, {"prompt": "y", "prompt_id": True},
        "missing id", "prompt_id", "True",
    ),
    "id again": (
        {"prompt": "x", "prompt_id": "a"}, {"prompt": "y", "prompt_id": "a"},
        "duplicate id", "prompt_id", "row 1",
    ),
    "prompt again, no ids": ({"prompt": "x"}, {"prompt": "x"}, "duplicate id", "prompt", "row 1"),
    "a list": ({"prompt": "x"}, ["x"], "not an object", None, "list"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_or_counted(tmp_path, name):
    good, bad, reason, column, detail = BAD[name]
    file = tmp_path / "x.jsonl"
    file.write_text(f"{json.dumps(good)}\n\n{json.dumps(bad)}\n")
    with pytest.raises(DataError) as caught:
        load_prompts(str(file))
    message = str(caught.value)
    assert message.startswith(f"{file}, row 2 (line 3)")
    assert reason in message and detail in message and "on_bad_row" in message
    assert column is None or f"column {column!r}" in message
    found = load_prompts(str(file), on_bad_row="drop")
    assert len(found) == 1 and found.dropped == {reason: (2,)}


def test_invalid_json_line(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"\n{"prompt": "c"}\n{"prompt": \n')
    with pytest.raises(DataError, match=r"row 2 \(line 2\): invalid JSON: .* at character"):
        load_prompts(str(file))
    found = load_prompts(str(file), on_bad_row="drop")
    assert [p.messages[0].content for p in found] == ["a", "c"]
    assert found.dropped == {"invalid JSON": (2, 4)}


def test_nothing_left_is_an_error_even_when_dropping(tmp_path):
    (tmp_path / "x.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"no usable row: read 1, dropped \{'invalid JSON': 1\}"):
        load_prompts(str(tmp_path / "x.jsonl"), on_bad_row="drop")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no usable row: read 0"):
        load_prompts(str(tmp_path / "empty.jsonl"))


def test_missing_columns_name_those_there_and_the_nearest(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"promt": "x", "id": 1}])
    with pytest.raises(DataError, match=r"'prompt'; .* 'promt'\? The columns are: promt, id\."):
        load_prompts(file, on_bad_row="drop")
    with pytest.raises(DataError, match=r"missing column 'key'"):
        load_prompts(file, prompt="promt", prompt_id="key")
    with pytest.raises(DataError, match=r"missing column 'best'"):
        load_prompts(file, prompt="promt", chosen="best")
    half = write(tmp_path / "y.jsonl", [{"prompt": "x", "rejected": "y"}])
    with pytest.raises(DataError, match="missing column 'chosen'"):
        load_prompts(half)


def test_implicit_strings_are_refused(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"chosen": "Sky is blue.", "rejected": "Sky is green."}])
    for policy in ("error", "drop"):
        with pytest.raises(DataError, match=r"row 1 \(line 1\).*not clear where.*list of messages"):
            load_prompts(file, on_bad_row=policy)


def test_several_pairs_of_one_prompt_are_numbered(tmp_path):
    rows = [
        {"prompt": "x", "prompt_id": i, "chosen": c, "rejected": "r"}
        for i, c in [("a", "1"), ("a", "2"), ("b", "1"), ("a", "3"), ("a", "2")]
    ]
    file = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match="duplicate_ids to 'number'"):
        load_prompts(file)
    with pytest.raises(DataError, match="row 5 .*duplicate row.*row 2"):
        load_prompts(file, duplicate_ids="number")
    found = load_prompts(file, duplicate_ids="number", on_bad_row="drop")
    assert [(p.id, p.chosen) for p in found] == [("a", "1"), ("a#2", "2"), ("b", "1"), ("a#3", "3")]
    assert found.dropped == {"duplicate row": (5,)}
    other = [{"prompt": "x", "prompt_id": "a"}, {"prompt": "y", "prompt_id": "a"}]
    with pytest.raises(DataError, match="id of another prompt"):
        load_prompts(write(tmp_path / "y.jsonl", other), duplicate_ids="number")


def test_unknown_policies(tmp_path):
    for setting in ({"on_bad_row": "skip"}, {"duplicate_ids": "keep"}):
        with pytest.raises(ValueError, match="expected"):
            load_prompts(str(tmp_path), **setting)


# Files and folders.


def test_missing_file_suggests_a_neighbour(tmp_path):
    write(tmp_path / "train.jsonl", [{"prompt": "x"}])
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file.*train\.jsonl'\?"):
        load_prompts(str(tmp_path / "trian.jsonl"))


def test_unreadable_files(tmp_path):
    cases = {
        "x.txt": (b"hello", "unknown file type"),
        "x.parquet": (b"PAR1 but not really", "cannot be read as parquet"),
        "x.json": (b'{"prompt": "a"}\n{"prompt": "b"}', "invalid JSON: .*line 2, .*jsonl"),
        "y.json": (b'{"prompt": "a"}', "found dict, expected a list"),
        "x.jsonl": (b'{"prompt": "a"}\n{"prompt": "\xff"}', "line 2: not UTF-8"),
        "x.csv": (b'prompt,n\n"a"b,1\n', "line 2: invalid CSV"),
        "y.csv": (b"prompt,prompt\na,b\n", "occurs twice"),
        "z.csv": (b"prompt,n\na,1\nb\n", r"row 2 \(line 3\): wrong number of cells"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.*{message}"):
            load_prompts(str(tmp_path / name))


def test_lines_end_at_newlines_alone(tmp_path):
    text = "one\u2028two\u0085three\x0bfour"  # str.splitlines would cut this row in four
    file = tmp_path / "x.jsonl"
    body = json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n"
    file.write_bytes(b"\xef\xbb\xbf" + body.encode())  # and a byte order mark, as Windows writes
    assert load_prompts(str(file))[0].messages[0].content == text


def test_csv_rows_over_several_lines_keep_their_line(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text('prompt,n\n"a\nb",1\n\n" ",2\n')
    with pytest.raises(DataError, match=r"row 2 \(line 5\), column 'prompt': empty prompt"):
        load_prompts(str(file))


def test_splits_of_a_folder(tmp_path):
    (tmp_path / "data").mkdir()
    for shard in (1, 0, 2):
        rows = [{"prompt": f"train {shard} {i}"} for i in range(2)]
        write(tmp_path / "data" / f"train-{shard:05d}-of-00003.parquet", rows)
    write(tmp_path / "test.jsonl", [{"prompt": "test"}])
    (tmp_path / "README.md").write_text("no table")
    texts = [p.messages[0].content for p in load_prompts(str(tmp_path), split="train")]
    assert texts == [f"train {shard} {i}" for shard in range(3) for i in range(2)]
    assert len(load_prompts(str(tmp_path), split="test")) == 1
    with pytest.raises(DataError, match=r"several splits: test, train.*data\.train_split"):
        load_prompts(str(tmp_path))
    with pytest.raises(DataError, match=r"no split 'trian'; .* 'train'\?.*test, train"):
        load_prompts(str(tmp_path), split="trian")
    with pytest.raises(DataError, match="is a single file"):
        load_prompts(str(tmp_path / "test.jsonl"), split="test")
    with pytest.raises(DataError, match="no revision 'main'"):
        load_prompts(str(tmp_path), split="test", revision="main")
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match="complete set of shards.*train-00000-of-00003"):
        load_prompts(str(tmp_path), split="train")
    write(tmp_path / "test.json", [{"prompt": "test"}])
    with pytest.raises(DataError, match=r"there twice"):
        load_prompts(str(tmp_path), split="test")


def test_a_folder_of_one_split_needs_no_name(tmp_path):
    with pytest.raises(
        DataError, match="no .jsonl, .json, .parquet, .csv, .tsv, .arrow file in this folder"
    ):
        load_prompts(str(tmp_path))
    write(tmp_path / "anything.jsonl", [{"prompt": "x"}])
    assert len(load_prompts(str(tmp_path))) == 1


# The Hub, through a stand-in for its one function.


@pytest.fixture
def hub(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    calls = []
    splits = {
        "train_prefs": datasets.Dataset.from_list([{**UF, "prompt_id": "a", "score_chosen": 2.0}]),
        "test_prefs": datasets.Dataset.from_list([{**UF, "prompt_id": "b"}] * 2),
    }

    def load_dataset(name, config=None, split=None, revision=None):
        calls.append((name, config, split, revision))
        if name != "owner/set":
            raise datasets.exceptions.DatasetNotFoundError(f"{name} is not on the Hub")
        return datasets.DatasetDict(splits) if split is None else splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls, splits


def test_hub(hub):
    calls, splits = hub
    (one,) = load_prompts("owner/set", split="train_prefs", revision="abc")
    assert calls == [("owner/set", None, "train_prefs", "abc")]
    row = {"score_chosen": 2.0, "messages": UF["messages"]}
    assert one == Prompt("a", turns(USER), "Good.", "Bad.", row)
    with pytest.raises(DataError, match=r"owner/set \[test_prefs\], row 2, column 'prompt_id'"):
        load_prompts("owner/set", split="test_prefs")
    with pytest.raises(DataError, match="several splits: train_prefs, test_prefs"):
        load_prompts("owner/set")
    with pytest.raises(DataError, match="no such file or folder, and the Hub.*is not on the Hub"):
        load_prompts("owner/other")
    del splits["test_prefs"]
    assert len(load_prompts("owner/set")) == 1


def test_a_typo_in_a_relative_path_never_asks_the_hub(hub, tmp_path):
    calls, _ = hub
    (tmp_path / "data").mkdir()
    for name in ("data/prompts", "elsewhere/prompts.jsonl", "prompts"):
        with pytest.raises(DataError, match="no such file or folder"):
            load_prompts(name)
    assert calls == []


def test_datasets_is_imported_only_for_the_hub():
    code = (
        "import sys; from selm_jax.text.prompts import load_prompts; "
        f"load_prompts({str(QUICKSTART / 'quickstart_heldout.jsonl')!r}); "
        "sys.exit(any(m in sys.modules for m in ('datasets', 'torch', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# Portions and digests.


def numbered(count):
    return [Prompt(str(i), (Message("user", str(i)),)) for i in range(count)]


@pytest.mark.parametrize(("portions", "size", "unused"), [(4, 15_283, 3), (3, 20_378, 1)])
def test_portions_of_the_paper(portions, size, unused):
    prompts = numbered(61_135)
    parts = [portion(prompts, i, portions) for i in range(1, portions + 1)]
    assert [len(p) for p in parts] == [size] * portions
    joined = list(itertools.chain(*parts))
    assert joined == prompts[:-unused]


@settings(deadline=None)
@given(st.data(), st.integers(1, 60), st.none() | st.integers(0, 2**64))
def test_portions_are_equal_disjoint_and_miss_only_the_remainder(data, count, seed):
    portions = data.draw(st.integers(1, count))
    prompts = numbered(count)
    parts = [portion(prompts, i, portions, shuffle_seed=seed) for i in range(1, portions + 1)]
    assert {len(p) for p in parts} == {count // portions}
    ids = [p.id for part in parts for p in part]
    assert len(set(ids)) == len(ids) == count - count % portions
    if seed is None:
        assert ids == [p.id for p in prompts[: len(ids)]]
    else:  # how the order is cut does not change the order
        whole = portion(prompts, 1, 1, shuffle_seed=seed)
        assert ids == [p.id for p in whole[: len(ids)]]
        assert sorted(whole, key=lambda p: int(p.id)) == prompts


def test_shuffle_is_the_same_for_ever_and_differs_by_seed():
    order = [p.id for p in portion(numbered(10), 1, 1, shuffle_seed=42)]
    assert order == list("7164359028")
    assert order != [p.id for p in portion(numbered(10), 1, 1, shuffle_seed=43)]


@pytest.mark.parametrize(("index", "portions"), [(0, 3), (4, 3), (1, 0), (-1, 3), (1, 11)])
def test_impossible_portions(index, portions):
    with pytest.raises(ValueError, match="portion"):
        portion(numbered(10), index, portions)


def test_digest_sees_every_field_and_the_order():
    base = Prompt("a", turns(USER), "c", "r", {"n": 1, "m": None})
    line = (
        '{"chosen":"c","id":"a","messages":[["user","How is the soup?"]],'
        '"rejected":"r","row":{"m":null,"n":1}}\n'
    )
    assert prompts_digest([base]) == hashlib.sha256(line.encode()).hexdigest()
    assert prompts_digest(
        [Prompt("a", turns(USER), "c", "r", {"m": None, "n": 1})]
    ) == prompts_digest([base])
    others = [
        [Prompt("b", turns(USER), "c", "r", {"n": 1, "m": None})],
        [Prompt("a", turns(AGAIN), "c", "r", {"n": 1, "m": None})],
        [Prompt("a", turns(SYSTEM, USER), "c", "r", {"n": 1, "m": None})],
        [Prompt("a", turns(USER), None, "r", {"n": 1, "m": None})],
        [Prompt("a", turns(USER), "c", "x", {"n": 1, "m": None})],
        [Prompt("a", turns(USER), "c", "r", {"n": 2, "m": None})],
        [],
        [base, base],
        numbered(2),
        numbered(2)[::-1],
    ]
    assert len({prompts_digest(o) for o in [[base], *others]}) == len(others) + 1


# Any data, written the obvious way and read back.

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda s: s.strip()
)


@st.composite
def pair_rows(draw):
    """Rows of a pair with unique ids, as UltraFeedback writes them or as plain strings."""
    ids = draw(st.lists(TEXT, min_size=1, max_size=4, unique=True))
    as_strings = draw(st.booleans())
    rows, prompts = [], []
    for name in ids:
        texts = draw(st.lists(TEXT, min_size=1, max_size=5).filter(lambda t: len(t) % 2))
        if as_strings:
            texts = texts[:1]
        messages = [
            {"content": t, "role": ("user", "assistant")[i % 2]} for i, t in enumerate(texts)
        ]
        good, bad = draw(st.lists(TEXT, min_size=2, max_size=2, unique_by=lambda s: s.strip()))
        rows.append(
            {
                "prompt": texts[0],
                "prompt_id": name,
                "chosen": good if as_strings else [*messages, said(good)],
                "rejected": bad if as_strings else [*messages, said(bad)],
                "source": draw(TEXT),
            }
        )
        prompts.append(Prompt(name, turns(*messages), good, bad, {"source": rows[-1]["source"]}))
    return rows, prompts, as_strings


@settings(deadline=None, max_examples=60)
@given(pair_rows())
def test_round_trip(tmp_path_factory, case):
    rows, prompts, as_strings = case
    folder = tmp_path_factory.mktemp("round_trip")
    for kind in KINDS if as_strings else KINDS[:-1]:
        found = load_prompts(write(folder / f"x{kind}", rows))
        assert list(found) == prompts
        assert prompts_digest(found) == prompts_digest(prompts)


def test_a_bad_row_is_left_out_of_its_portion_and_moves_no_other(tmp_path):
    rows = [{"prompt": f"Say {i}.", "prompt_id": f"p{i}"} for i in range(9)]
    whole = load_prompts(write(tmp_path / "whole.jsonl", rows))
    assert whole.by_row() == list(whole)
    rows[1]["prompt"] = rows[5]["prompt"] = " "
    found = load_prompts(write(tmp_path / "x.jsonl", rows), on_bad_row="drop")
    for seed in (None, 3):
        for i in (1, 2, 3):
            cut, of_whole = (portion(x.by_row(), i, 3, shuffle_seed=seed) for x in (found, whole))
            assert cut == [None if p.id in ("p1", "p5") else p for p in of_whole]


# Real preference pairs, where a copy lies beside the checkout.


@pytest.mark.skipif(not ALPACA.is_dir(), reason=f"no preference data at {ALPACA}")
@pytest.mark.parametrize(("split", "rows", "prompts"), [
    ("train_prefs", 1787, 697), ("test_prefs", 273, 108),
])  # fmt: skip
def test_real_pairs(split, rows, prompts):
    with pytest.raises(DataError, match="duplicate_ids"):  # several pairs of one prompt
        load_prompts(str(ALPACA), split=split)
    found = load_prompts(str(ALPACA), split=split, duplicate_ids="number", on_bad_row="drop")
    assert set(found.dropped) == {"duplicate row"}
    table = pq.read_table(ALPACA / f"{split}.parquet").to_pylist()
    assert len(table) == rows
    texts = [(r["prompt"], r["chosen"][-1]["content"], r["rejected"][-1]["content"]) for r in table]
    first = {text: number for number, text in reversed(list(enumerate(texts, start=1)))}
    repeats = tuple(n for n, text in enumerate(texts, start=1) if first[text] != n)
    assert found.dropped == {"duplicate row": repeats}
    assert [(p.messages[0].content, p.chosen, p.rejected) for p in found] == list(
        dict.fromkeys(texts)
    )
    assert len({p.id.partition("#")[0] for p in found}) == prompts
    assert {len(p.messages) for p in found} == {1}
    parts = [portion(found, i, 3, shuffle_seed=0) for i in (1, 2, 3)]
    ids = [p.id for part in parts for p in part]
    assert len(set(ids)) == len(ids) == len(found) - len(found) % 3


# The quickstart's own prompts keep what their README says.


@pytest.fixture(scope="module")
def quickstart():
    return {s: load_prompts(str(QUICKSTART), split=f"quickstart_{s}") for s in ("train", "heldout")}


def words(prompt):
    return re.findall(r"[a-z0-9]+", prompt.messages[0].content.lower().replace("'", ""))


def test_quickstart_rows(quickstart):
    assert {s: len(p) for s, p in quickstart.items()} == {"train": 384, "heldout": 64}
    for split, prompts in quickstart.items():
        assert [p.id for p in prompts] == [f"{split}-{i:04d}" for i in range(1, len(prompts) + 1)]
        for p in prompts:
            text = p.messages[0].content
            assert text.isascii() and text.isprintable() and text == " ".join(text.split())
            assert 8 <= len(text.split()) <= 30, text
            assert re.search(r"\b(sentences?|lines?|brief|short|ten words)\b", text), text


def test_quickstart_counts_are_those_of_the_readme(quickstart):
    table = re.findall(
        r"^\| (\w+) \| (\d+) \| (\d+) \|$", (QUICKSTART / "README.md").read_text(), re.MULTILINE
    )
    stated = {name: (int(a), int(b)) for name, a, b in table}
    assert stated.pop("all") == (384, 64)
    counts = {s: collections.Counter(p.row["category"] for p in ps) for s, ps in quickstart.items()}
    assert stated == {c: (n, counts["heldout"][c]) for c, n in counts["train"].items()}
    for i in range(1, 4):  # an iteration sees every category
        assert {p.row["category"] for p in portion(quickstart["train"], i, 3)} == set(stated)


def test_quickstart_heldout_shares_no_five_words_with_train(quickstart):
    def grams(prompt):
        w = words(prompt)
        return {tuple(w[i : i + 5]) for i in range(len(w) - 4)}

    seen = set().union(*map(grams, quickstart["train"]))
    assert {p.id: grams(p) & seen for p in quickstart["heldout"] if grams(p) & seen} == {}


@pytest.mark.slow
def test_quickstart_prompts_are_not_alike(quickstart):
    everyone = [(p.id, " ".join(words(p))) for ps in quickstart.values() for p in ps]
    alike = []
    matcher = difflib.SequenceMatcher(autojunk=False)
    for i, (name, text) in enumerate(everyone):
        matcher.set_seq2(text)  # what the matcher keeps is about its second text
        for other, earlier in everyone[:i]:
            matcher.set_seq1(earlier)
            bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
            if all(bound() >= 0.8 for bound in bounds):
                alike.append((name, other))
    assert alike == []
