"""Cells: conversations and numbers stored as text, and texts that are neither."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selm_jax.text import cells
from selm_jax.text.prompts import DataError, Message, load_prompts
from selm_jax.text.tables import BadRow

# Quotes, backslashes, braces and line ends: what a text in a text goes wrong with.
texts = st.text(
    st.sampled_from("'\"\\{}[]()\n\t \u2028") | st.characters(exclude_categories=["Cs"]),
    max_size=12,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"content": texts, "role": st.sampled_from(["system", "user", "assistant"])},
        optional={"name": st.none() | texts},
    ),
    min_size=1,
    max_size=4,
)


def as_numpy(value):
    """The text that pandas writes into a CSV cell of a column that it read from parquet."""
    array = np.empty(len(value), dtype=object)
    array[:] = value
    return str(array)


@given(messages)
def test_a_list_of_messages_comes_back_from_whatever_text_it_was_kept_as(value):
    for write in (json.dumps, repr, str, as_numpy):
        assert cells.unwrapped(write(value), "chosen") == value
        assert cells.unwrapped(f" {write(value)}\n", "chosen") == value


@given(messages, st.data())
def test_a_list_of_messages_that_was_cut_is_no_plain_text(value, data):
    value = [{key: each[key] for key in ("content", "role")} for each in value]
    for write in (json.dumps, repr):
        whole = write(value)
        cut = whole[: data.draw(st.integers(len('[{"content":'), len(whole) - 1))]
        with pytest.raises(BadRow) as caught:
            cells.unwrapped(cut, "chosen")
        assert caught.value.column == "chosen" and "stored as text" in caught.value.detail


@given(st.one_of(texts, st.lists(texts), st.dictionaries(texts, texts), st.integers()))
def test_other_texts_stay_as_they_are(value):
    for text in (repr(value), json.dumps(value), str(value)):
        assert cells.unwrapped(text, "prompt") == text


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "user", "content": "x"}] Is this right?',
        "[{'role': 'user', 'content': __import__('os').system('touch ran')}]",
        "[{'role': " + "[" * 100_000,
        "[{'role': " + "\\'" * 100_000,
        "[{'role': '" + "[{'" * 100_000,
        "[{'role': 'user', 'content': 'x', 'content': 'y'}",
        '[{"role": "user", "role": "user", "content": "y"}',
        "array([{'role': 'user', 'content': array(['x'], dtype=object)}], dtype=object)",
    ],
)
def test_what_begins_as_messages_is_whole_or_refused_and_nothing_runs(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRow, match="bad message"):
        cells.unwrapped(text, "prompt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (7, 7.0), (8.5, 8.5), ("8.5", 8.5), (" 7 ", 7.0), ("-1e-3", -1e-3), (".5", 0.5),
        ("3.", 3.0),
        ("", None), (None, None), (True, None), ("nan", None), ("inf", None), ("1_0", None),
        ("1,5", None), (10**400, None), ("0x1", None), ("seven", None), ([1], None),
        ("1e999", None), (float("nan"), None), (float("inf"), None),
    ],
)  # fmt: skip
def test_numbers(value, number):
    assert cells.as_number(value) == number


ASKED = [
    [
        {"content": "Be brief. It's \"new\".", "role": "system"},
        {"content": f"Say {i}.", "role": "user"},
    ]
    for i in range(3)
]  # fmt: skip


@pytest.mark.parametrize("write", [json.dumps, repr, as_numpy])
def test_a_csv_of_conversations_reads_as_the_same_in_json(tmp_path, write):
    rows = [
        {"prompt": asked[1]["content"],
         "chosen": [*asked, {"content": "Yes\n{ok}.", "role": "assistant"}],
         "rejected": [*asked, {"content": "No.", "role": "assistant"}]}
        for asked in ASKED
    ]  # fmt: skip
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "x.csv").open("w", newline="") as f:
        table = csv.DictWriter(f, list(rows[0]))
        table.writeheader()
        for row in rows:
            table.writerow({k: v if k == "prompt" else write(v) for k, v in row.items()})
    found = load_prompts(str(tmp_path / "x.csv"))
    assert list(found) == list(load_prompts(str(tmp_path / "x.jsonl")))
    assert found[0].messages[0] == Message("system", 'Be brief. It\'s "new".')
    assert found[0].chosen == "Yes\n{ok}."


HALF = "Half an emoji \ud83d here"
SURROGATES = {
    "prompt": ({"prompt": HALF}, "prompt"),
    "chosen": ({"chosen": "Yes \udc00."}, "chosen"),
    "a message": ({"prompt": [{"role": "user", "content": HALF}]}, "prompt"),
    "a message kept as text": ({"prompt": repr([{"role": "user", "content": HALF}])}, "prompt"),
    "id": ({"prompt_id": "\ud83d"}, "prompt_id"),
    "system": ({"system": HALF}, "system"),
    "another column": ({"note": [{"deep": HALF}]}, "note"),
    "a key": ({"note": {HALF: 1}}, "note"),
}


@pytest.mark.parametrize("name", SURROGATES)
def test_half_a_surrogate_pair_is_named_or_counted(tmp_path, name):
    change, column = SURROGATES[name]
    good = {
        "prompt": "a",
        "chosen": "b",
        "rejected": "c",
        "prompt_id": "1",
        "system": "s",
        "note": 0,
    }
    bad = good | {"prompt": "d", "prompt_id": "2"} | change
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(
        DataError, match=rf"row 2 \(line 2\), column '{column}': lone surrogate: '.ud"
    ):
        load_prompts(str(file))
    assert load_prompts(str(file), on_bad_row="drop").dropped == {"lone surrogate": (2,)}


def test_pairs_of_surrogates_are_a_character(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "\\ud83d\\ude00"}\n')
    assert load_prompts(str(tmp_path / "x.jsonl"))[0].messages[0].content == "😀"


def test_deep_nesting_is_a_bad_row(tmp_path):
    deep = [f'{{"prompt": "{d}", "x": {"[" * d}{"]" * d}}}' for d in (1, 64, 65, 500, 100_000)]
    (tmp_path / "x.jsonl").write_text("\n".join(deep))
    found = load_prompts(str(tmp_path / "x.jsonl"), on_bad_row="drop")
    assert [p.messages[0].content for p in found] == ["1", "64"]
    assert found.dropped == {"nested too deeply": (3, 4), "invalid JSON": (5,)}


SYSTEM = "Answer in French."


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_column_of_system_messages_goes_before_the_prompts(tmp_path, column):
    rows = [
        {column: SYSTEM, "question": "One?"},
        {column: "", "question": "Two?"},
        {column: None, "question": "Three?"},
        {column: SYSTEM, "question": [{"role": "system", "content": SYSTEM},
                                      {"role": "user", "content": "Four?"}]},
    ]  # fmt: skip
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_prompts(str(file), prompt="question", system=column)
    first = [p.messages[0] for p in found]
    system = Message("system", SYSTEM)
    assert first == [system, Message("user", "Two?"), Message("user", "Three?"), system]
    assert [len(p.messages) for p in found] == [2, 1, 1, 2]
    assert all(column not in p.row for p in found)
    (note,) = found.notes
    assert f"{column!r} gives 2 of 4 prompts" in note
    # Where it is not read, that is said, whatever it is called.
    unread = load_prompts(str(file), prompt="question", system=None)
    assert [len(p.messages) for p in unread] == [1, 1, 1, 2]
    (note,) = unread.notes
    assert f"{column!r} is not read" in note and "data.system_column" in note


def test_a_system_column_that_cannot_be_used(tmp_path):
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = [{"prompt": asked, "system": SYSTEM}, {"prompt": "b", "system": 3}, {"prompt": "c"}]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="row 1 .*column 'system': two system messages: .*Be brief"):
        load_prompts(str(file))
    found = load_prompts(str(file), on_bad_row="drop")
    assert found.dropped == {"two system messages": (1,), "wrong type": (2,)} and len(found) == 1
    with pytest.raises(DataError, match="missing column 'sistem'"):
        load_prompts(str(file), system="sistem")
