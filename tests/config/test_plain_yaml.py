"""YAML that means what is written, in bounded time and memory."""

import json
import time
import tracemalloc

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from selm_jax.config import plain_yaml
from selm_jax.config.plain_yaml import YamlError, read, read_value

# What YAML 1.2's core schema says (yaml.org/spec/1.2.2, 10.3.2), and where 1.1 says another thing.
SCALARS = {
    "042": 42, "08": 8, "0o17": 15, "0x1F": 31, "-7": -7, "+7": 7, "1:30": "1:30",
    "1_000": "1_000", "1e3": 1000.0, "5e-7": 5e-7, "1.": 1.0, ".5": 0.5, "-2.5E+3": -2500.0,
    "1e": "1e", "0b101": "0b101", "1,000": "1,000", "12e03": 12000.0, ".": ".",
    "yes": "yes", "no": "no", "on": "on", "off": "off", "y": "y", "true": True, "False": False,
    "tRUE": "tRUE", "null": None, "~": None, "": None, "2024-07-26": "2024-07-26",
    "2024-13-45": "2024-13-45", "nan": "nan", "inf": "inf", "-.inf": -float("inf"),
}  # fmt: skip


@pytest.mark.parametrize("text", SCALARS)
def test_scalars_are_those_of_the_core_schema(text):
    expected = SCALARS[text]
    found = read(f"key: {text}\n")[0]["key"]
    assert found == expected and type(found) is type(expected)
    assert read_value(text) == expected and type(read_value(text)) is type(expected)
    assert read(f"key: '{text}'\n")[0]["key"] == text  # in quotes it is text


def test_not_a_number_is_read_as_one():
    assert read_value(".nan") != read_value(".nan")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
        | st.sampled_from(list(SCALARS)),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    )
)  # fmt: skip
def test_what_is_written_is_read_again_by_this_reader_and_by_json(value):
    tree = {"key": value}
    assert read(plain_yaml.dump(tree))[0] == tree
    assert read(json.dumps(tree, ensure_ascii=True))[0] == tree


@pytest.mark.parametrize(
    "text", ["\x85", "\u2028", "a\u2029b", "a\nb", "\n", " ", "\t", "\ufeff", "\x7f"]
)
def test_odd_texts_are_read_again_as_keys_too(text):
    tree = {text: text, "in": [{text: 1}]}
    assert read(plain_yaml.dump(tree))[0] == tree == yaml.safe_load(plain_yaml.dump(tree))


@given(st.text())
def test_other_readers_read_the_same_texts(text):
    assert yaml.safe_load(plain_yaml.dump({"key": text})) == {"key": text}


def test_json_escapes_of_emoji_are_one_character():
    assert read('key: "\\ud83d\\ude00 \\u00e9"')[0] == {"key": "😀 é"}
    for half in ("\\ud83d", "\\ude00\\ud83d"):
        with pytest.raises(YamlError, match="line 2: half of a surrogate pair"):
            read(f'a: 1\nkey: "{half}"')


@pytest.mark.parametrize(
    "text,said",
    [
        ("a: 1\nb: 2\na: 3\n", "lines 1 and 3: the key a is given twice"),
        ("a:\n  b: 1\n  c: {d: 1, e: 2, d: 3}\n", "lines 3 and 3: the key a.c.d is given twice"),
        ("a:\n- b: 1\n- b: 1\n  b: 2\n", "lines 3 and 4: the key a.1.b is given twice"),
        ("'a': 1\na: 2\n", "lines 1 and 2: the key a "),
        ("a: 1\nb: [1\n", "line 3: not YAML"),
        ("a: 1\n---\na: 2\n", "line 2: not YAML"),
        ("? [a]\n: 1\n", "line 1: a key is a list"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1: the tag .* is not supported"),
        ("a: !!timestamp 2024-13-45\n", "line 1: the tag"),
        ("a: !mine 1\n", "line 1: the tag !mine"),
        ("a: *b\n", "line 1: not YAML: found undefined alias"),
        ("a: 1\nb: \x01\n", "line 2: YAML does not allow"),
        ("a: &x [*x]\n", "levels, with every alias"),
        ("<<: 3\n", "line 1: << must be followed by a mapping"),
        ("a: {x: 1}\n<<: {b: 1}\n<<: {c: 1}\n", "lines 2 and 3: the key << "),
    ],
)
def test_what_could_mean_two_things_is_refused_with_its_line(text, said):
    with pytest.raises(YamlError, match=said):
        read(text)


def test_merged_mappings_count_less_than_what_stands_beside_them():
    text = "one: &one {a: 1, b: 1, c: 1}\ntwo: &two {b: 2, d: 2}\nthree: {<<: [*two, *one], a: 3}\n"
    assert read(text)[0]["three"] == {"a": 3, "b": 2, "c": 1, "d": 2}
    assert read(text)[0] == yaml.safe_load(text)


def test_lines_of_all_values():
    _, lines = read("a: 1\nb:\n  c: [1,\n    2]\n  d:\n    e: x\n")
    assert lines[("a",)] == 1 and lines[("b", "c")] == 3 and lines[("b", "c", 1)] == 4
    assert lines[("b", "d", "e")] == 6


@pytest.mark.parametrize("data", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_other_encodings_are_named(data):
    text = "output: run\n# café\n"
    with pytest.raises(YamlError, match="UTF-8") as error:
        plain_yaml.decoded(text.encode(data))
    assert data != "latin-1" or "line 2: the byte 0xe9" in str(error.value)
    assert plain_yaml.decoded(text.encode("utf-8-sig")) == text  # a mark in front is no matter


BOMBS = {
    "aliases": "x0: &x0 [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 12)),
    "merges": "x0: &x0 {a: 1}\n"
    + "".join(f"x{i}: &x{i} {{<<: [{','.join([f'*x{i - 1}'] * 9)}]}}\n" for i in range(1, 12)),
    "flow": "x: " + "[" * 5000 + "]" * 5000,
    "block": "\n".join(" " * i + "x:" for i in range(3000)),
    "dashes": "- " * 20_000,
    "large": "x: " + "a" * (2 << 20),
    "many": "[" + "1," * 60_000 + "1]",
}


@pytest.mark.parametrize("name", BOMBS)
def test_time_and_memory_are_bounded(name, tmp_path):
    file = tmp_path / "bomb.yaml"
    file.write_text(BOMBS[name])
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(YamlError):
        plain_yaml.read_file(file)
    assert time.process_time() - began < 20
    assert tracemalloc.get_traced_memory()[1] < 300 << 20
    tracemalloc.stop()


def test_long_numbers_are_texts():
    assert read_value("1" * 5000) == "1" * 5000  # Python itself refuses to read them


@pytest.mark.parametrize(
    "text,value",
    [
        ("Answer #1", "Answer #1"),
        ("#abc", "#abc"),
        ("a b # c", "a b # c"),
        ("'a # b'", "a # b"),
        ("[1, 'a # b']", [1, "a # b"]),
        ("{loss: dpo, beta: 0.1}", {"loss": "dpo", "beta": 0.1}),
        (" 1e2 ", 100.0),
        ("a#b", "a#b"),
        ("~/x", "~/x"),
        ("null", None),
    ],
)
def test_nothing_in_a_value_on_the_command_line_is_a_comment(text, value):
    assert read_value(text) == value


@pytest.mark.parametrize("text", ["[1, 2] # two", "{a: b # c\n}", "'a' # b"])
def test_a_comment_that_would_cut_a_value_is_refused(text):
    with pytest.raises(YamlError, match="comment"):
        read_value(text)
