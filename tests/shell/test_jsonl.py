"""JSON lines from any writer are read back by the one reader."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selm_jax.shell import artifacts, jsonl, loglines

SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\rj"
texts = st.text(st.sampled_from(SEPARATORS + " é\n") | st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    texts | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(values, max_size=5), st.booleans(), st.booleans(), st.booleans())
def test_every_value_comes_back_with_its_line(rows, ascii_only, ended, mark):
    raw = "\n \r\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode()
    raw = b"\xef\xbb\xbf" * mark + raw + b"\n" * (ended and bool(rows))
    found = list(jsonl.lines(raw))
    assert [line.value() for line in found] == rows
    assert [line.number for line in found] == [1 + 2 * i for i in range(len(rows))]
    assert [line.ended for line in found] == [True] * (len(rows) - 1) + [ended] * bool(rows)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1', "Expecting ',' delimiter at character 8"),
        ('[1,\n 2,\n x]', "Expecting value at line 3, character 2"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' appears twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("1" * 5000, "limit .* for integer string conversion"),
    ],
)  # fmt: skip
def test_what_is_no_value_is_said(text, says):
    with pytest.raises(jsonl.JsonError, match=says):
        jsonl.value(text)


def test_bytes_that_are_not_utf8_spoil_their_line_alone():
    one, two, three = jsonl.lines(b'{"a": 1}\n{"a": "\xff"}\n{"a": 3}')
    assert one.value() == {"a": 1} and three.value() == {"a": 3}
    with pytest.raises(jsonl.JsonError, match="not UTF-8"):
        two.value()


def test_lines_are_rewritten_whatever_their_texts_hold(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "said": SEPARATORS} for step in range(4)]
    for row in rows:
        loglines.append_line(file, row)
    with file.open("ab") as f:
        f.write('{"step": 4, "said": "é'.encode()[:-1])  # a kill cuts inside a character
    loglines.rewrite_lines(file, lambda line: line["step"] != 1)
    assert loglines.read_lines(file) == [rows[0], rows[2], rows[3]]
    assert loglines.read_lines(tmp_path / "absent.jsonl") == []


def test_a_line_that_is_not_json_is_named(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n\nnone\n')
    with pytest.raises(
        artifacts.ArtifactError,
        match=r"metrics\.jsonl, line 3: not JSON.*`selm redo .* STAGE -t T`",
    ):
        loglines.read_lines(file)
