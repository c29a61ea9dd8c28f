"""Parsing of contestants and rankers from the command line."""

import pytest
from typer.testing import CliRunner

from selm_jax.config import ConfigError
from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.command import app
from selm_jax.evaluation.contestants import ranker_for
from selm_jax.feedback.ranker import FeedbackError, Question

QUESTION = Question("q", (), {}, "p")


@pytest.mark.parametrize("text", ["100", "1e2", "1E+2", "100.0"])
def test_a_number_with_an_exponent_is_a_number(text):
    ranker = ranker_for("length", [f"target={text}"], [])
    assert ranker.scores([QUESTION], [["x" * 100, "x"]])[0].tolist() == [0.0, -99.0]


def test_values_are_read_as_in_experiment_files():
    ranker = ranker_for("regex", ["pattern=a #b", "flags=i"], [])
    assert ranker.scores([QUESTION], [["A #B", "a"]])[0].tolist() == [1.0, 0.0]
    for setting, error, said in (
        ("target=yes", FeedbackError, "target is 'yes'; expected a whole number"),
        ("target=1:30", FeedbackError, "target is '1:30'"),
        ("target=true", FeedbackError, "target is True"),
        ("target=[1", EvaluationError, "target=...: the value cannot be read: line 1: not YAML"),
        ("target", EvaluationError, "expected key=value"),
        ("target={api_key: abc}", ConfigError, "target.api_key: its name suggests that it"),
    ):
        with pytest.raises(error, match=said):
            ranker_for("length", [setting], [])


@pytest.mark.parametrize(
    "option,said",
    [
        (["--temperature", "0"], "--samples 0 uses the greedy"),
        (["--temperature", "nan"], "expected a number"),
        (["--top-p", "0"], "1 keeps all tokens"),
        (["--top-p", "nan"], "1 keeps all tokens"),
        (["--seed", "-1"], "0"),
        (["--seed", "1e2"], "integer"),
    ],
)
def test_options_have_ranges(option, said):
    found = CliRunner().invoke(app, ["winrate", "a", "b", *option], standalone_mode=False)
    assert found.exit_code and said in getattr(found.exception, "message", "")
