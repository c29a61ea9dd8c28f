"""Rules: VADER, length, regular expressions, and a user's function by dotted path."""

import importlib
import re
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selm_jax.feedback import rules
from selm_jax.feedback.ranker import FeedbackError, Question, build


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
            rules.length(target)


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
        with pytest.raises(FeedbackError, match=r"bad pattern '\('"):
            rules.regex("(")
        with pytest.raises(FeedbackError, match="unknown flag 'q' in 'iq'"):
            rules.regex("a", "iq")

    def test_a_pattern_of_a_yaml_number_is_refused(self):
        with pytest.raises(Exception, match="42"):  # our check, or the annotations' where checked
            build("regex", pattern=42)


MODULE = """
import math

def good(prompt, response, row):
    return len(response) * row["weight"] + len(prompt)

def spoils_its_row(prompt, response, row):
    row["weight"] = row.get("weight", 0) + 1
    return row["weight"]

def raises(prompt, response, row):
    return row["no_such_column"] if response == "bad" else 0.0

def nothing(prompt, response, row):
    print(response)

def not_a_number(prompt, response, row):
    return math.nan if response == "bad" else 0.0

def word(prompt, response, row):
    return "7/10"

def two(prompt, response):
    return 0.0

not_a_function = 3
"""


@pytest.fixture
def user_rules(tmp_path, monkeypatch):
    """A package on sys.path; gives its dotted name, new for every test."""
    package = tmp_path / "house_rules"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "taste.py").write_text(MODULE)
    (package / "broken.py").write_text("import no_such_library_here\n")
    (package / "syntax.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield "house_rules"
    for name in [each for each in sys.modules if each.startswith("house_rules")]:
        del sys.modules[name]


class TestUserFunction:
    def test_gets_prompt_response_and_row(self, user_rules):
        ranker = build(f"{user_rules}.taste:good")
        assert ranker.name == f"{user_rules}.taste:good"
        questions = [question("four", "a", weight=10), question("", "b", weight=1)]
        scores = ranker.scores(questions, [["x", "xy"], ["xyz"]])
        assert [each.tolist() for each in scores] == [[14.0, 24.0], [3.0]]

    def test_cannot_change_the_row_of_the_next_candidate(self, user_rules):
        row = {"weight": 5}
        ranker = build(f"{user_rules}.taste:spoils_its_row")
        (scores,) = ranker.scores([Question("q", (), row, "p")], [["a", "b"]])
        assert scores.tolist() == [6.0, 6.0] and row == {"weight": 5}

    @pytest.mark.parametrize(
        ("name", "what"),
        [
            ("raises", "the rule raised KeyError: 'no_such_column'"),
            ("not_a_number", "the score is nan"),
        ],
    )
    def test_a_fault_names_rule_prompt_and_candidate(self, user_rules, name, what):
        path = f"{user_rules}.taste:{name}"
        questions = [question(id="ok"), question(id="row-17")]
        with pytest.raises(FeedbackError) as caught:
            build(path).scores(questions, [["fine"], ["fine", "fine", "bad"]])
        assert str(caught.value).startswith(
            f"ranker '{path}', prompt 'row-17', candidate 2: {what}"
        )

    def test_the_rules_own_error_is_kept_as_the_cause(self, user_rules):
        with pytest.raises(FeedbackError) as caught:
            build(f"{user_rules}.taste:raises").scores([question()], [["bad"]])
        assert isinstance(caught.value.__cause__, KeyError)

    @pytest.mark.parametrize(("name", "what"), [("nothing", "None"), ("word", "'7/10'")])
    def test_what_is_no_number_is_shown(self, user_rules, name, what):
        with pytest.raises(FeedbackError, match=f"candidate 0: the score is {what}"):
            build(f"{user_rules}.taste:{name}").scores([question()], [["a"]])

    @pytest.mark.parametrize(
        ("path", "what"),
        [
            ("house_rules.tast:good", "ModuleNotFoundError.*PYTHONPATH"),
            ("house_rules.taste:goood", "has no 'goood'; did you mean 'good'.*taste.py"),
            ("house_rules.taste:not_a_function", "is a int; expected a function"),
            ("house_rules.taste:two", r"two\(prompt, response\); expected one"),
            ("house_rules.broken:f", "no_such_library_here"),
            ("house_rules.syntax:f", "SyntaxError"),
            ("house_rules.taste:", "expected the form 'package.module:function'"),
            (":good", "expected the form"),
            (".taste:good", "expected the form"),
            ("a:b:c", "expected the form"),
        ],
    )
    def test_bad_paths_are_found_when_the_ranker_is_built(self, user_rules, path, what):
        with pytest.raises(FeedbackError, match=what):
            build(path)

    def test_a_function_without_a_signature_is_taken_on_trust(self):
        # Some C functions carry no signature; the fault then shows at the first call.
        with pytest.raises(FeedbackError, match="candidate 0: the rule raised TypeError"):
            build("builtins:max").scores([question()], [["a"]])
