"""Rankers that need no model: sentiment, length, regular expressions, a user's own function.

A rule looks at one response at a time and runs in this process: a rule that hangs hangs the stage.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from selm_jax.feedback.ranker import (
    FeedbackError,
    Question,
    check_questions,
    check_scores,
    did_you_mean,
)

_FLAGS = {
    "a": re.ASCII,
    "i": re.IGNORECASE,
    "m": re.MULTILINE,
    "s": re.DOTALL,
    "x": re.VERBOSE,
}


@dataclass(frozen=True)
class RuleRanker:
    """A function of one response, as a ranker.

    Attributes:
        name: names the rule in reports and errors.
        function: `(prompt, response, row) -> number`; `row` is a fresh dict at every call, so a
            rule that adds to it cannot reach the next candidate.
    """

    name: str
    function: Callable[[str, str, dict[str, Any]], Any]

    def scores(
        self, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
    ) -> list[Float64[np.ndarray, " candidates"]]:
        """One float64 array `[candidates]` per question; see `ranker.Ranker`.

        Raises:
            FeedbackError: the rule raised, or returned what is no finite number; names the rule,
                the prompt's id and the candidate's index.
        """
        check_questions(self.name, questions, candidates)
        raw = [
            [self._one(question, index, text) for index, text in enumerate(texts)]
            for question, texts in zip(questions, candidates, strict=True)
        ]
        return check_scores(self.name, questions, candidates, raw)

    def _one(self, question: Question, index: int, response: str) -> Any:
        try:
            return self.function(question.prompt, response, dict(question.row))
        except Exception as error:
            raise FeedbackError(
                f"ranker {self.name!r}, prompt {question.id!r}, candidate {index}: the rule "
                f"raised {type(error).__name__}: {error}"
            ) from error


def sentiment() -> RuleRanker:
    """VADER's compound sentiment of the response, from -1 (worst mood) to 1 (best).

    Source: Hutto and Gilbert (2014), "VADER: A Parsimonious Rule-based Model for Sentiment
    Analysis of Social Media Text"; the word list is English. The value is rounded to 4 places and
    saturates on long texts, so long responses can tie near 1. An empty response gives 0.

    Raises:
        FeedbackError: the package vaderSentiment is not installed.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise FeedbackError(
            f"ranker 'sentiment': cannot import vaderSentiment ({error}). "
            "Install it: pip install vaderSentiment"
        ) from error
    analyzer = SentimentIntensityAnalyzer()
    return RuleRanker(
        "sentiment", lambda _, response, __: analyzer.polarity_scores(response)["compound"]
    )


def length(target: int | None = None) -> RuleRanker:
    """Length of the response in characters; with a target, minus the distance from it.

    Args:
        target: characters, at least 0; None means the longer the better.

    Raises:
        FeedbackError: the target is not a whole number of at least 0.
    """
    if target is None:
        return RuleRanker("length", lambda _, response, __: len(response))
    if isinstance(target, bool) or not isinstance(target, int) or target < 0:
        raise FeedbackError(
            f"ranker 'length': target is {target!r}; expected a whole number of characters, "
            "at least 0."
        )
    return RuleRanker("length", lambda _, response, __: -abs(len(response) - target))


def regex(pattern: str, flags: str = "") -> RuleRanker:
    """How many times the pattern matches in the response (without overlaps, as `re.finditer`).

    An empty match counts too: `\\A(?!.*sorry)` with flags `s` scores 1 without the word, else 0.

    Args:
        pattern: a Python regular expression.
        flags: letters of Python's inline flags: a (ASCII), i (ignore case), m (multi-line),
            s (dot matches newline), x (verbose).

    Raises:
        FeedbackError: the pattern does not compile or a flag is unknown.
    """
    if not isinstance(pattern, str) or not isinstance(flags, str):
        raise FeedbackError(
            f"ranker 'regex': found pattern {pattern!r} and flags {flags!r}; expected two strings."
        )
    bits = re.RegexFlag(0)
    for letter in flags:
        if letter not in _FLAGS:
            raise FeedbackError(
                f"ranker 'regex': unknown flag {letter!r} in {flags!r}; expected letters of "
                f"{''.join(_FLAGS)!r}."
            )
        bits |= _FLAGS[letter]
    try:
        compiled = re.compile(pattern, bits)
    except re.error as error:
        raise FeedbackError(f"ranker 'regex': bad pattern {pattern!r}: {error}.") from error
    return RuleRanker(
        "regex", lambda _, response, __: sum(1 for _match in compiled.finditer(response))
    )


def user_function(path: str) -> RuleRanker:
    """A user's function `(prompt: str, response: str, row: dict) -> float` as a ranker.

    Args:
        path: `package.module:function`, importable from `sys.path`.

    Raises:
        FeedbackError: bad path, the module cannot be imported, it has no such function, or the
            function cannot be called with three arguments.
    """
    module_name, _, name = path.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise FeedbackError(f"ranker {path!r}: expected the form 'package.module:function'.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: its own code can raise anything
        raise FeedbackError(
            f"ranker {path!r}: importing {module_name!r} raised {type(error).__name__}: {error}. "
            "If it was not found, add the folder that holds it to PYTHONPATH."
        ) from error
    if not hasattr(module, name):
        public = [each for each in vars(module) if not each.startswith("_")]
        raise FeedbackError(
            f"ranker {path!r}: the module has no {name!r}{did_you_mean(name, public)} "
            f"It was loaded from {getattr(module, '__file__', None)}."
        )
    function = getattr(module, name)
    if not callable(function):
        raise FeedbackError(
            f"ranker {path!r}: {name!r} is a {type(function).__name__}; expected a function "
            "(prompt, response, row) -> float."
        )
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C carry no signature; the first call will tell
        return RuleRanker(path, function)
    try:
        signature.bind("", "", {})
    except TypeError as error:
        raise FeedbackError(
            f"ranker {path!r}: the function is {name}{signature}; expected one that can be "
            f"called as {name}(prompt, response, row): {error}."
        ) from error
    return RuleRanker(path, function)
