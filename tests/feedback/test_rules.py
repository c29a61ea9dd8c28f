"""Rules: VADER, length, regular expressions, verifiable instructions."""

import json
import re
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selm_jax.feedback import rules
from selm_jax.feedback.ranker import FeedbackError, Question, build_ranker, check_asked
from selm_jax.text.prompts import load_prompts


def question(prompt="Q?", id="p0", **row):
    return Question(prompt=prompt, messages=(), row=row, id=id)


def score(ranker, *responses, **row):
    (scores,) = ranker.scores([question(**row)], [responses])
    assert scores.dtype == np.float64 and scores.shape == (len(responses),)
    return scores.tolist()


class TestSentiment:
    def test_signs(self):
        good, bad, none, negated = score(
            rules.sentiment(),
            "This film is wonderful, I loved it!",
            "A horrible, boring waste of time.",
            "The train leaves at nine.",
            "This is not good.",
        )
        assert good > 0.5 and bad < -0.5 and none == 0.0 and negated < 0.0

    def test_shouting_is_stronger(self):
        calm, loud = score(rules.sentiment(), "The food is great.", "The food is GREAT!!!")
        assert 0 < calm < loud

    @given(st.text(max_size=40))
    def test_bounded_on_any_text(self, text):
        assert -1.0 <= score(_VADER, text)[0] <= 1.0

    def test_an_empty_response_is_neutral(self):
        assert score(rules.sentiment(), "", "   ") == [0.0, 0.0]


_VADER = rules.sentiment()


class TestLength:
    def test_counts_characters_not_bytes(self):
        assert score(rules.length(), "", "abc", "é\U0001f600") == [0.0, 3.0, 2.0]

    def test_with_a_target_the_nearest_wins_from_both_sides(self):
        assert score(rules.length(target=3), "", "ab", "abc", "abcde") == [-3.0, -1.0, 0.0, -2.0]

    def test_a_target_of_zero_is_a_target(self):
        assert score(rules.length(target=0), "", "ab") == [0.0, -2.0]

    @pytest.mark.parametrize("target", [-1, True])
    def test_bad_target(self, target):
        with pytest.raises(FeedbackError, match="target is"):
            build_ranker("length", target=target)


class TestRegex:
    def test_counts_matches_without_overlaps(self):
        assert score(rules.regex("aa"), "", "aa", "aaa", "aaaa") == [0.0, 1.0, 1.0, 2.0]

    def test_flags(self):
        text = "One\none"
        assert score(rules.regex("^one$"), text) == [0.0]
        assert score(rules.regex("^one$", "im"), text) == [2.0]
        assert score(rules.regex("e.o", "s"), text) == [1.0]
        assert score(rules.regex(r"o n e", "xi"), text) == [2.0]
        assert score(rules.regex(r"\w", "a"), "é") == [0.0]

    def test_a_look_ahead_scores_absence(self):
        rule = rules.regex(r"\A(?!.*sorry)", "s")
        assert score(rule, "Here it is.", "I am\nsorry.") == [1.0, 0.0]

    @given(st.text("ab\n", max_size=30))
    def test_same_as_findall(self, text):
        assert score(rules.regex("a+b|b"), text) == [len(re.findall("a+b|b", text))]

    def test_bad_pattern_and_bad_flag(self):
        with pytest.raises(FeedbackError, match=r"invalid pattern '\('"):
            rules.regex("(")
        with pytest.raises(FeedbackError, match="unknown flag 'q' in 'iq'"):
            rules.regex("a", "iq")

    def test_a_pattern_of_a_yaml_number_is_refused(self):
        with pytest.raises(Exception, match="42"):  # our check, or the annotations' where checked
            build_ranker("regex", pattern=42)


def follow(*instructions, **settings):
    """A ranker, and a question with instructions (id, arguments)."""
    pytest.importorskip("if_verifiable", reason="the extra if-verifiable is not installed")
    columns = {
        "instruction_id_list": [name for name, _ in instructions],
        "kwargs": [arguments for _, arguments in instructions],
    }
    return build_ranker("verifiable", **settings), question(**columns)


NO_COMMA = ("punctuation:no_comma", {"num_words": None, "relation": None})
TWO_WORDS = ("length_constraints:number_words", {"num_words": 3, "relation": "less than"})


class TestVerifiable:
    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            ("partial_strict", [1.0, 0.5, 0.0, 0.0, 1.0]),
            ("binary_strict", [1.0, 0.0, 0.0, 0.0, 1.0]),
        ],
    )
    def test_the_share_of_the_instructions_that_are_followed(self, kind, expected):
        ranker, asked = follow(NO_COMMA, TWO_WORDS, score=kind)
        texts = ["Yes sir", "Yes my dear sir", "Yes, my dear sir", "  ", "<think>a, b</think>Yes"]
        (scores,) = ranker.scores([asked], [texts])
        assert ranker.name == "verifiable" and scores.tolist() == expected

    def test_loose_forgives_a_first_line(self):
        for kind, expected in (("partial_strict", 0.0), ("partial_loose", 1.0)):
            ranker, asked = follow(NO_COMMA, score=kind)
            assert ranker.scores([asked], [["Sure, here:\nYes"]])[0].tolist() == [expected]

    def test_the_language_is_guessed_the_same_way_every_time(self):
        ranker, asked = follow(("language:response_language", {"language": "de"}))
        text = "der die das ist not the"
        assert len({ranker.scores([asked], [[text]])[0][0] for _ in range(10)}) == 1

    def test_the_same_instructions_for_every_prompt(self):
        follow()
        ranker = build_ranker(
            "verifiable", instructions={NO_COMMA[0]: {}, TWO_WORDS[0]: TWO_WORDS[1]}
        )
        for _ in range(2):
            assert ranker.scores([question()], [["a b", "a, b, c"]])[0].tolist() == [1.0, 0.0]
        with pytest.raises(FeedbackError, match="lacks its arguments num_words, relation"):
            build_ranker("verifiable", instructions={TWO_WORDS[0]: {}})
        with pytest.raises(FeedbackError, match="instructions: found 0 instruction ids"):
            build_ranker("verifiable", instructions={})

    def test_columns_by_other_names(self):
        follow()
        ranker = build_ranker("verifiable", ids="what", kwargs="how")
        asked = question(what=[NO_COMMA[0]], how=[None])
        assert ranker.scores([asked], [["a", "a,"]])[0].tolist() == [1.0, 0.0]

    @pytest.mark.parametrize(
        ("instructions", "what"),
        [
            ([], "found 0 instruction ids"),
            ([("punctuation:no_coma", {})], "unknown .*; did you mean 'punctuation:no_comma'"),
            ([("length_constraints:number_words", {"num_words": 3})], "arguments relation"),
            ([("keywords:existence", {"keywords": None})], "arguments keywords"),
        ],
    )
    def test_instructions_that_cannot_be_checked(self, instructions, what):
        # The package would skip the unknown, and draw what is missing at random.
        ranker, asked = follow(*instructions)
        with pytest.raises(
            FeedbackError, match=f"'verifiable', prompt 'p0', candidate 0: .*{what}"
        ):
            ranker.scores([asked], [["a"]])

    @pytest.mark.parametrize("write", [json.dumps, repr])
    def test_columns_that_were_kept_as_text(self, write):
        ranker, asked = follow(NO_COMMA, TWO_WORDS)
        texts = {column: write(value) for column, value in asked.row.items()}
        answers = [["Yes sir", "Yes my dear sir", "Yes, my dear sir"]]
        (scores,) = ranker.scores([question(**texts)], answers)
        assert scores.tolist() == ranker.scores([asked], answers)[0].tolist() == [1.0, 0.5, 0.0]

    @pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
    def test_rows_of_a_file_reach_it(self, tmp_path, kind):
        rows = [
            {"key": 0, "prompt": "Use no commas.", "instruction_id_list": [NO_COMMA[0]],
             "kwargs": [{}]},
            {"key": 1, "prompt": "And few words.", "kwargs": [{}, TWO_WORDS[1]],
             "instruction_id_list": [NO_COMMA[0], TWO_WORDS[0]]},
        ]  # fmt: skip
        file = tmp_path / f"ifeval{kind}"
        if kind == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = [Question("Q?", p.messages, p.row, p.id) for p in load_prompts(str(file))]
        ranker, _ = follow()
        ranker.check(asked)
        first, second = ranker.scores(asked, [["a b c d", "a, b"]] * 2)
        assert first.tolist() == [1.0, 0.0] and second.tolist() == [0.5, 0.5]

    def test_rows_are_looked_at_before_there_are_answers(self):
        ranker, asked = follow(NO_COMMA)
        bad = question(id="p7", instruction_id_list="none", kwargs=[{}])
        mixed = build_ranker("mixture", parts=[{"ranker": "length"}, {"ranker": "verifiable"}])
        for each in (ranker, mixed):
            check_asked(each, [asked])
            with pytest.raises(FeedbackError, match="'p7': .*'none'; expected a list of texts"):
                check_asked(each, [asked, bad])
        check_asked(build_ranker("verifiable", instructions={NO_COMMA[0]: {}}), [bad])
        check_asked(build_ranker("length"), [bad])

    def test_a_row_without_instructions(self):
        ranker, _ = follow()
        with pytest.raises(FeedbackError, match="no column 'instruction_id_list'.*It has: topic"):
            ranker.scores([question(topic="x")], [["a"]])

    def test_data_of_nltk_that_is_not_there(self, monkeypatch):
        sentences = ("length_constraints:number_sentences", {"num_sentences": 1})
        ranker, asked = follow((sentences[0], sentences[1] | {"relation": "at least"}))
        import nltk

        monkeypatch.setattr(nltk.data, "path", [])
        nltk.data.clear_cache()
        from if_verifiable.ifeval import instructions_util

        instructions_util._get_sentence_tokenizer.cache_clear()
        with pytest.raises(FeedbackError, match="python -m nltk.downloader punkt_tab"):
            ranker.scores([asked], [["One. Two."]])

    def test_without_the_extra_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "if_verifiable", None)
        with pytest.raises(FeedbackError, match="pip install if-verifiable"):
            build_ranker("verifiable")

    def test_unknown_score(self):
        with pytest.raises(FeedbackError, match="'partial_strikt'; did you mean 'partial_strict'"):
            build_ranker("verifiable", score="partial_strikt")


def test_a_rules_own_error_is_kept_as_the_cause():
    def broken(prompt, response, row):
        return row["no_such_column"]

    with pytest.raises(FeedbackError, match="'r', prompt 'p0', candidate 1.*KeyError") as caught:
        rules.RuleRanker("r", lambda p, r, row: 0.0 if r == "a" else broken(p, r, row)).scores(
            [question()], [["a", "b"]]
        )
    assert isinstance(caught.value.__cause__, KeyError)
