"""Rankers that need no model: sentiment, length, regular expressions, verifiable instructions.

A rule scores one response at a time and runs in this process, since its code is fast and trusted. A
user's own function runs in separate processes; see `workers`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from selm_jax.feedback.ranker import FeedbackError, Question, check_questions, check_scores
from selm_jax.shell.ranges import Natural
from selm_jax.shell.words import did_you_mean
from selm_jax.text.cells import shortened, structure

_FLAGS = {
    "a": re.ASCII,
    "i": re.IGNORECASE,
    "m": re.MULTILINE,
    "s": re.DOTALL,
    "x": re.VERBOSE,
}


@dataclass(frozen=True)
class RuleRanker:
    """A ranker that scores each response on its own, with a function.

    Attributes:
        name: the rule's name in reports and errors.
        function: `(prompt, response, row) -> number`. `row` is a new copy for every call, so that
            changes to it do not affect the next candidate.
        check_row: raises FeedbackError for a row that the function cannot use.
    """

    name: str
    function: Callable[[str, str, dict[str, Any]], Any]
    check_row: Callable[[Mapping[str, Any]], Any] = lambda row: None

    def check(self, questions: Sequence[Question]) -> None:
        """Raises FeedbackError with the prompt's ID for the first row that the rule cannot use."""
        for question in questions:
            try:
                self.check_row(question.row)
            except FeedbackError as error:
                raise FeedbackError(
                    f"ranker {self.name!r}, prompt {question.id!r}: {error}"
                ) from error

    def scores(
        self, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
    ) -> list[Float64[np.ndarray, " candidates"]]:
        """Scores the candidates: one float64 array per question; see `ranker.Ranker`.

        Raises:
            FeedbackError: the rule raised, or did not return a finite number; the message names the
                rule, the prompt's ID and the candidate's index.
        """
        check_questions(self.name, questions, candidates)
        raw = [
            [self._one(question, index, text) for index, text in enumerate(texts)]
            for question, texts in zip(questions, candidates, strict=True)
        ]
        return check_scores(self.name, questions, candidates, raw)

    def _one(self, question: Question, index: int, response: str) -> Any:
        where = f"ranker {self.name!r}, prompt {question.id!r}, candidate {index}"
        try:
            return self.function(question.prompt, response, question.own_row())
        except FeedbackError as error:
            raise FeedbackError(f"{where}: {error}") from error
        except Exception as error:
            raise FeedbackError(
                f"{where}: the rule raised {type(error).__name__}: {error}"
            ) from error


def sentiment() -> RuleRanker:
    """Makes a ranker by VADER's sentiment of a response, from -1 (negative) to 1 (positive).

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


def length(target: Natural | None = None) -> RuleRanker:
    """Makes a ranker by length in characters, or by minus the distance from a target length.

    Args:
        target: the target in characters; None means the longer the better.
    """
    if target is None:
        return RuleRanker("length", lambda _, response, __: len(response))
    return RuleRanker("length", lambda _, response, __: -abs(len(response) - target))


def regex(pattern: str, flags: str = "") -> RuleRanker:
    """Makes a ranker that counts non-overlapping matches of a pattern in the response.

    An empty match counts: `\\A(?!.*sorry)` with flags `s` scores 1 for a text without "sorry".

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
        raise FeedbackError(f"ranker 'regex': invalid pattern {pattern!r}: {error}.") from error
    return RuleRanker(
        "regex", lambda _, response, __: sum(1 for _match in compiled.finditer(response))
    )


VERIFIABLE_SCORES = ("partial_strict", "partial_loose", "binary_strict", "binary_loose")


def verifiable(
    score: str = "partial_strict",
    ids: str = "instruction_id_list",
    kwargs: str = "kwargs",
    instructions: Mapping[str, Any] | None = None,
) -> RuleRanker:
    """Makes a ranker that checks by program how well a response follows instructions (IFEval).

    Source: Zhou et al. (2023), "Instruction-Following Evaluation for Large Language Models",
    arXiv 2311.07911, through the package if-verifiable. Thoughts before `</think>` do not count;
    an empty response scores 0. The language check is seeded: a response always scores the same.

    Args:
        score: `partial_strict` is the share of the prompt's instructions that are followed;
            `binary_strict` is 1 if all are, else 0. The `loose` ones ignore asterisks and an extra
            first or last line.
        ids: the column of the row with instruction ids, such as `punctuation:no_comma`.
        kwargs: the column of the row with their arguments: one mapping per id, in which unused
            arguments may be None. Both columns may also be text, in JSON or as Python prints them.
        instructions: arguments by id, for all prompts alike, in place of the row's columns:
            `{punctuation:no_comma: {}}`.

    Raises:
        FeedbackError: if-verifiable is not installed, the score is unknown, or the instructions
            cannot be checked.
    """
    if score not in VERIFIABLE_SCORES:
        raise FeedbackError(
            f"ranker 'verifiable': unknown score {score!r}"
            f"{did_you_mean(str(score), VERIFIABLE_SCORES)} Expected one of "
            f"{', '.join(VERIFIABLE_SCORES)}."
        )
    try:
        import langdetect
        from if_verifiable import IFEvalSample, evaluate_output_for_sample
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
    except ImportError as error:
        raise FeedbackError(
            f"ranker 'verifiable': cannot import if-verifiable ({error}). "
            "Install it: pip install if-verifiable"
        ) from error
    langdetect.DetectorFactory.seed = 0  # otherwise its results are random

    for_all = None
    if instructions is not None:
        try:
            for_all = _checked(list(instructions), list(instructions.values()), INSTRUCTION_DICT)
        except FeedbackError as error:
            raise FeedbackError(f"ranker 'verifiable', instructions: {error}") from error

    def follows(prompt: str, response: str, row: dict[str, Any]) -> float:
        names, arguments = for_all or _of_row(row, ids, kwargs, INSTRUCTION_DICT)
        sample = IFEvalSample(key=0, prompt=prompt, instruction_id_list=names, kwargs=arguments)
        try:
            _, scores = evaluate_output_for_sample("ifeval", sample, response)
        except LookupError as error:
            if "nltk" not in str(error):
                raise
            raise FeedbackError(
                "the check needs nltk data that is not on this machine. Download it with "
                "python -m nltk.downloader punkt_tab"
            ) from error
        return getattr(scores, score)

    def check_row(row: Mapping[str, Any]) -> None:
        if for_all is None:
            _of_row(row, ids, kwargs, INSTRUCTION_DICT)

    return RuleRanker("verifiable", follows, check_row)


def _of_row(
    row: Mapping[str, Any], ids: str, kwargs: str, known: Mapping[str, Any]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Reads and checks the instruction ids of a dataset row, and each instruction's arguments."""
    for column in (ids, kwargs):
        if column not in row:
            raise FeedbackError(
                f"the row has no column {column!r}{did_you_mean(column, row)} It has: "
                f"{', '.join(row) or 'none'}."
            )
    try:
        return _checked(_listed(row, ids, str), _listed(row, kwargs, dict), known)
    except FeedbackError as error:
        raise FeedbackError(f"columns {ids!r} and {kwargs!r}: {error}") from error


def _listed(row: Mapping[str, Any], column: str, kind: type) -> list[Any]:
    """Reads a row's column as a list, and checks that every item has type `kind` or is None."""
    value = row[column]
    found = structure(value) if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(x, kind | None) for x in found):
        name = {str: "texts", dict: "objects"}[kind]
        raise FeedbackError(f"{column!r} is {shortened(value)}; expected a list of {name}.")
    return list(found)


def _checked(
    names: list[str], given: list[Any], known: Mapping[str, Any]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Checks the instruction ids of a dataset row, and the arguments of each instruction.

    Unknown ids and missing arguments are errors here. The package would skip unknown ids and choose
    missing arguments at random.
    """
    if not names or len(names) != len(given):
        raise FeedbackError(
            f"found {len(names)} instruction ids and {len(given)} mappings of arguments; expected "
            "at least one, and one mapping for each id."
        )
    arguments = [dict(each or {}) for each in given]
    for name, each in zip(names, arguments, strict=True):
        if name not in known:
            raise FeedbackError(f"unknown instruction id {name!r}{did_you_mean(str(name), known)}")
        needed = known[name](name).get_instruction_args_keys()
        if missing := [key for key in needed if each.get(key) is None]:
            raise FeedbackError(
                f"the instruction {name!r} lacks its arguments {', '.join(missing)}. Add them."
            )
    return names, arguments
